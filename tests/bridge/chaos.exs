# make chaos: ten thousand calls under fire, ten minutes at most. CHAOS_SEED repeats a run.
alias Tinkex.CustomLoss.Test.Chaos

Logger.configure(level: :none)
seed = String.to_integer(System.get_env("CHAOS_SEED", "4"))
result = Chaos.run(calls: 10_000, seed: seed, seconds: 560)

IO.puts("seed #{seed}")
IO.inspect(result.asked, label: "asked", limit: :infinity)
IO.inspect(result.outcomes, label: "outcomes")
if result.wrong > 0, do: IO.inspect(result.examples, label: "wrong, for example")
IO.puts(Chaos.summary(result))

whole = %{calls: 10_000, answers: 10_000, wrong: 0, orphans: 0}
if Map.take(result, Map.keys(whole)) != whole, do: System.halt(1)
