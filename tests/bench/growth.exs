# One point of growth.py: nll + l2 + entropy + kl over the bridge, on so many values in so many
# datums. Prints milliseconds and megabytes: what the BEAM and the worker together take over an idle
# pool, the batch and the answer among it.
#
#     mix run tests/bench/growth.exs VALUES DATUMS ROUNDS

for file <- ["figures.exs", "batch.exs", "resident.exs"], do: Code.require_file(file, __DIR__)

alias Bench.{Batch, Figures, Resident}
alias Tinkex.CustomLoss

[values, datums, rounds] = Enum.map(System.argv(), &String.to_integer/1)
{:ok, pool} = CustomLoss.start_link(await_ready: true)
pids = Resident.pids(pool)

compute = fn batch ->
  {:ok, _output} =
    CustomLoss.compute(
      pool,
      Batch.data(batch, :work),
      Batch.logprobs(batch),
      [timeout: :infinity] ++ Batch.options(:work)
    )
end

compute.(Batch.new(1_000))
idle = Resident.settled(pids)
Resident.reset_most(pids)
batch = Batch.new(values, datums)
times = for _ <- 1..rounds, do: Figures.milliseconds(fn -> compute.(batch) end)
most = Resident.most(pids)
taken = for({name, bytes} <- most, do: bytes - idle[name]) |> Enum.sum()
IO.puts("#{Figures.median(times)} #{(taken + Resident.shared(pids)) / 1.0e6}")
