# What the bridge costs, as a multiple of a port written by hand for one computation: float32
# binaries in, the loss and its gradient out. The bridge does the whole of its work for it: terms by
# name, each with its own gradient, norm and place in the record.
#
#     bridge_SIZE   one L2 term, over a port that computes it
#     work_SIZE     nll + l2 + entropy + kl, over a port that runs one callback of their sum
#     datums_SIZE   one L2 term on 1,024 datums, over the same values in 8
#
#     mix run tests/bench/bridge.exs

for file <- ["figures.exs", "batch.exs", "hand_port.exs"], do: Code.require_file(file, __DIR__)

defmodule Bench.Bridge do
  alias Bench.{Batch, Figures, HandPort}
  alias Tinkex.CustomLoss

  # {size, values in a batch, {target, rounds} of one term, of the work}
  @sizes [
    {"1k", 1_000, {1.3, 2_000}, {1.5, 1_000}},
    {"100k", 100_000, {0.5, 400}, {0.7, 150}},
    {"1m", 1_000_000, {0.30, 60}, {0.45, 30}},
    {"4m", 4_000_000, {0.30, 20}, {0.40, 14}}
  ]
  @datums [{"100k", 102_400, 300}, {"1m", 1_048_576, 60}]
  @datums_target 1.15

  def run do
    {:ok, pool} = CustomLoss.start_link(await_ready: true)

    for loss <- [:l2, :work] do
      port = HandPort.open(Atom.to_string(loss))
      for size <- @sizes, do: against_port(pool, port, loss, size)
      Port.close(port)
    end

    for size <- @datums, do: datums(pool, size)
  end

  defp against_port(pool, port, loss, {size, values, one_term, work}) do
    {prefix, {target, rounds}} =
      case loss do
        :l2 -> {"bridge", one_term}
        :work -> {"work", work}
      end

    batch = Batch.new(values)
    ours = ours(pool, batch, loss)
    arrays = Batch.arrays(batch, loss)
    by_hand = fn -> HandPort.compute(port, arrays) end
    same!(ours.(), by_hand.())

    name = "#{prefix}_#{size}"
    [ours: ours, by_hand: by_hand] = Figures.medians(name, [ours: ours, by_hand: by_hand], rounds)
    Figures.figure(name, ours / by_hand, target)
  end

  defp datums(pool, {size, values, rounds}) do
    ways =
      for count <- [1_024, 8], do: {:"of_#{count}", ours(pool, Batch.new(values, count), :l2)}

    name = "datums_#{size}"
    [of_1024: many, of_8: few] = Figures.medians(name, ways, rounds)
    Figures.figure(name, many / few, @datums_target)
  end

  defp ours(pool, batch, loss) do
    {logprobs, data, options} =
      {Batch.logprobs(batch), Batch.data(batch, loss), Batch.options(loss)}

    fn ->
      {:ok, output} = CustomLoss.compute(pool, data, logprobs, options)
      output
    end
  end

  # What is not the same cannot be compared.
  defp same!(output, {loss, gradients}) do
    close!(output.loss_total, loss, 1.0e-4 * abs(loss))

    for {{ours, _shape}, by_hand} <- Enum.zip(output.gradients, gradients),
        at <- Enum.take_every(0..(div(byte_size(by_hand), 4) - 1), 101),
        do: close!(float(ours, at), float(by_hand, at), 1.0e-5)
  end

  defp close!(ours, by_hand, tolerance) do
    unless abs(ours - by_hand) <= tolerance,
      do: raise("the bridge says #{ours}, the port by hand #{by_hand}")
  end

  defp float(binary, at) do
    <<float::float-32-little>> = binary_part(binary, 4 * at, 4)
    float
  end
end

Bench.Bridge.run()
