# make fuzz: a million frames into the Elixir decoder. FUZZ_SEED repeats a run.
seed = String.to_integer(System.get_env("FUZZ_SEED", "4"))
count = String.to_integer(System.get_env("FUZZ_FRAMES", "1000000"))

resident = fn key ->
  [_, kib] = Regex.run(~r/#{key}:\s+(\d+) kB/, File.read!("/proc/self/status"))
  String.to_integer(kib) / 1024
end

File.write!("/proc/self/clear_refs", "5")
before = resident.("VmRSS")
{microseconds, seen} = :timer.tc(fn -> Tinkex.CustomLoss.Test.Fuzz.run(count, seed) end)
spike = resident.("VmHWM") - before

IO.puts(
  "elixir: #{count} frames, seed #{seed}, #{div(microseconds, 1_000_000)} s, #{inspect(seen)}"
)

IO.puts("elixir: crashes 0, memory +#{Float.round(spike, 1)} MiB at most")
if spike > 256, do: System.halt(1)
