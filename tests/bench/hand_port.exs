defmodule Bench.HandPort do
  @moduledoc """
  The Elixir side of `hand_port.py`: one process, one request at a time, default pipes.
  """

  def open(python) do
    script = Path.join(__DIR__, "hand_port.py")
    Port.open({:spawn_executable, python}, [:binary, packet: 4, args: ["-u", script]])
  end

  @doc "The loss and one gradient binary a datum, for one logprobs binary a datum."
  def compute(port, logprobs) do
    true = Port.command(port, logprobs)

    receive do
      {^port, {:data, <<loss::float-64-little, gradient::binary>>}} ->
        {loss, split(gradient, logprobs)}
    end
  end

  defp split(<<>>, []), do: []

  defp split(gradient, [datum | rest]) do
    <<part::binary-size(byte_size(datum)), gradient::binary>> = gradient
    [part | split(gradient, rest)]
  end
end
