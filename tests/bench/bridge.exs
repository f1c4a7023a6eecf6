# What the bridge costs, as a multiple of a port written by hand for this one computation:
# the L2 loss of a batch of 8 datums and its gradient, float32 binaries in and out. The bridge
# does the whole of its work for it: MessagePack, terms by name, records with gradient norms.
#
#     mix run tests/bench/bridge.exs
#
# prints `NAME VALUE (target T) ok|short` a figure, and the two medians on standard error.

Code.require_file("hand_port.exs", __DIR__)

defmodule Bench.Bridge do
  alias Bench.HandPort

  @datums 8
  # {name, values in a batch, target, rounds}
  @figures [
    {"bridge_1k", 1_000, 1.2, 2_000},
    {"bridge_100k", 100_000, 1.0, 400},
    {"bridge_1m", 1_000_000, 0.8, 80},
    {"bridge_4m", 4_000_000, 0.7, 40}
  ]

  def run do
    port = HandPort.open(System.fetch_env!("TINKEX_CUSTOM_LOSS_PYTHON"))

    {:ok, _} =
      Supervisor.start_link([{Tinkex.CustomLoss, name: __MODULE__}], strategy: :one_for_one)

    for {name, values, target, rounds} <- @figures do
      datum = div(values, @datums)
      logprobs = for _ <- 1..@datums, do: random_floats(datum)
      tensors = for binary <- logprobs, do: {binary, [datum]}

      {bridge, by_hand} =
        medians(rounds, fn -> compute(tensors) end, fn -> HandPort.compute(port, logprobs) end)

      ratio = bridge / by_hand
      verdict = if ratio <= target, do: "ok", else: "short"
      IO.puts("#{name} #{format(ratio)} (target #{format(target)}) #{verdict}")

      IO.puts(
        :stderr,
        "  bridge #{format(bridge)} ms, by hand #{format(by_hand)} ms, medians of #{rounds}"
      )
    end
  end

  defp compute(tensors) do
    {:ok, output} =
      Tinkex.CustomLoss.compute(__MODULE__, nil, tensors,
        regularizers: [%{name: "l2", fn: :l2, weight: 1.0}]
      )

    output
  end

  # Each round times both, and every other round in the other order, so that neither is always
  # the one that finds the caches cold.
  defp medians(rounds, one, other) do
    for _ <- 1..div(rounds, 10), do: {one.(), other.()}

    times =
      for round <- 1..rounds do
        if rem(round, 2) == 0 do
          first = milliseconds(one)
          {first, milliseconds(other)}
        else
          second = milliseconds(other)
          {milliseconds(one), second}
        end
      end

    {ones, others} = Enum.unzip(times)
    {median(ones), median(others)}
  end

  # The collection frees the last round's binaries, so that no call pays for another's.
  defp milliseconds(fun) do
    :erlang.garbage_collect()
    start = System.monotonic_time()
    fun.()
    System.convert_time_unit(System.monotonic_time() - start, :native, :nanosecond) / 1.0e6
  end

  defp median(times), do: times |> Enum.sort() |> Enum.at(div(length(times), 2))

  defp random_floats(count) do
    for _ <- 1..count, into: <<>>, do: <<-abs(:rand.normal())::float-32-little>>
  end

  defp format(number), do: :erlang.float_to_binary(number, decimals: 2)
end

Bench.Bridge.run()
