# Logprobs that are lists of floats, and gradients that are: the bridge, over a port by hand with the
# conversions that one would write, a comprehension in either direction.
#
#     lists_SIZE   one L2 term, 8 datums
#
#     mix run tests/bench/lists.exs

for file <- ["figures.exs", "batch.exs", "hand_port.exs"], do: Code.require_file(file, __DIR__)

defmodule Bench.Lists do
  alias Bench.{Batch, Figures, HandPort}
  alias Tinkex.CustomLoss

  @sizes [{"100k", 100_000, 80}, {"1m", 1_000_000, 12}]
  @target 0.7

  def run do
    {:ok, pool} = CustomLoss.start_link(await_ready: true)
    port = HandPort.open("l2")
    for {size, values, rounds} <- @sizes, do: size(pool, port, "lists_#{size}", values, rounds)
  end

  defp size(pool, port, name, values, rounds) do
    logprobs = Enum.map(Batch.new(values).logprobs, &Batch.list/1)

    ours = fn ->
      {:ok, output} = CustomLoss.compute(pool, nil, logprobs, Batch.options(:l2))
      output.gradients
    end

    by_hand = fn ->
      binaries = for list <- logprobs, do: for(x <- list, into: <<>>, do: <<x::float-32-little>>)
      {_loss, gradients} = HandPort.compute(port, [binaries])
      Enum.map(gradients, &Batch.list/1)
    end

    true = ours.() == by_hand.()
    ms = Figures.medians(name, [ours: ours, by_hand: by_hand], rounds)
    Figures.figure(name, ms[:ours] / ms[:by_hand], @target)
  end
end

Bench.Lists.run()
