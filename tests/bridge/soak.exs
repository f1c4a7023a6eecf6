# make soak: a hundred thousand small calls, every fiftieth after one that is large enough for shared
# memory, and the memory of both processes as they go by.
alias Tinkex.CustomLoss
alias Tinkex.CustomLoss.Bridge

calls = 100_000
callers = 4
values = 65_536
{:ok, pool} = CustomLoss.start_link(await_ready: true)
{:ok, %{workers: [%{os_pid: os_pid}]}} = CustomLoss.info(pool)

term = %{name: "l2", fn: :l2, weight: 1, params: %{reduction: "token_sum"}}

# No two callers have the same numbers.
large = fn number ->
  {
    :binary.copy(<<-number / 1::float-32-little>>, values),
    :binary.copy(<<-2.0 * number::float-32-little>>, values),
    1.0 * values * number * number
  }
end

run = fn count ->
  1..callers
  |> Enum.map(fn caller ->
    {logprobs, gradient, loss} = large.(caller)

    Task.async(fn ->
      for step <- 1..div(count, callers) do
        if rem(step, 50) == 0 do
          {:ok, output} =
            CustomLoss.compute(pool, nil, [{logprobs, [values]}], regularizers: [term], step: step)

          ^loss = output.loss_total
          [{^gradient, [^values]}] = output.gradients
        end

        {:ok, output} =
          CustomLoss.compute(pool, nil, [[-1.0, -2.0]], regularizers: [term], step: step)

        5.0 = output.loss_total
        [[-2.0, -4.0]] = output.gradients
      end
    end)
  end)
  |> Task.await_many(:infinity)
end

run.(5_000)
IO.puts("calls, beam MiB (in use), beam MiB (resident), python MiB (resident)")

for done <- 0..calls//div(calls, 10) do
  if done > 0, do: run.(div(calls, 10))
  for pid <- Process.list(), do: :erlang.garbage_collect(pid)
  used = :erlang.memory(:total)
  [beam, python] = for pid <- [System.pid(), os_pid], do: Bridge.resident(pid)

  [done | Enum.map([used, beam, python], &Float.round(&1 / 1_048_576, 1))]
  |> Enum.join(", ")
  |> IO.puts()
end
