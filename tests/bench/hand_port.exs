defmodule Bench.HandPort do
  @moduledoc """
  The Elixir side of `hand_port.py`: one process, one request at a time, default pipes.
  """

  def open(loss) do
    python = System.fetch_env!("TINKEX_CUSTOM_LOSS_PYTHON")
    args = ["-u", Path.join(__DIR__, "hand_port.py"), loss]
    Port.open({:spawn_executable, python}, [:binary, packet: 4, args: args])
  end

  @doc """
  The loss and one gradient binary a datum, for lists of one binary a datum: the logprobs, and what
  else the loss reads.
  """
  def compute(port, [logprobs | _] = arrays) do
    true = Port.command(port, arrays)

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
