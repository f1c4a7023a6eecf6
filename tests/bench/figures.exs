defmodule Bench.Figures do
  @moduledoc """
  How a figure is measured and printed, as `figures.py` does it: `NAME VALUE (target T) ok|short`.

  `run.py` reads these lines: both files print them alike.
  """

  @doc "Prints one figure, which is to be `:at_most` its target, or `:at_least`."
  def figure(name, value, target \\ nil, sense \\ :at_most)

  def figure(name, value, nil, _sense), do: IO.puts("#{name} #{digits(value)} (no target)")

  def figure(name, value, target, sense) do
    met = if sense == :at_most, do: value <= target, else: value >= target
    IO.puts("#{name} #{digits(value)} (target #{target}) #{if met, do: "ok", else: "short"}")
  end

  @doc """
  The median milliseconds of each of `ways`, `[name: function]`, taken in turn.

  Every other round goes in the other order: none is always the one with cold caches. What the last
  call has left is collected before the next, so that none pays for another's.
  """
  def medians(name, ways, rounds) do
    for _ <- 0..div(rounds, 10), {_way, function} <- ways, do: function.()

    times =
      for round <- 1..rounds do
        ways = if rem(round, 2) == 0, do: ways, else: Enum.reverse(ways)
        Map.new(ways, fn {way, function} -> {way, milliseconds(function)} end)
      end

    found = for {way, _} <- ways, do: {way, median(Enum.map(times, & &1[way]))}
    listed = Enum.map_join(found, ", ", fn {way, ms} -> "#{way} #{digits(ms)}" end)
    detail("#{name}: #{listed} ms, medians of #{rounds}")
    found
  end

  @doc "What stands behind a figure, on standard error."
  def detail(line), do: IO.puts(:stderr, "  " <> line)

  def milliseconds(function) do
    :erlang.garbage_collect()
    start = System.monotonic_time()
    function.()
    System.convert_time_unit(System.monotonic_time() - start, :native, :nanosecond) / 1.0e6
  end

  def median(numbers), do: numbers |> Enum.sort() |> Enum.at(div(length(numbers), 2))

  @doc "Three significant digits."
  def digits(number) when number == 0, do: "0"

  def digits(number) do
    decimals = max(2 - floor(:math.log10(abs(number))), 0)
    :erlang.float_to_binary(number / 1, decimals: decimals)
  end
end
