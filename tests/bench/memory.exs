# The most memory that a call takes, resident and over that of an idle pool, in payloads: the bytes
# of its logprobs as float32. The batch counts, and so does the answer.
#
#     memory_work_beam, _python     nll + l2 + entropy + kl, 512 datums of 8,192 values: a batch of
#                                   three payloads and an answer of one
#     memory_lists_beam, _python    one L2 term, 1,024 datums of 1,024 values as lists of floats,
#                                   which are eight payloads on the BEAM, in either direction
#     memory_..._kept               what of that is still there a second after the answer, when
#                                   batch and answer are dropped
#     memory_..._shared             what they share at that time and neither's resident memory has
#
#     mix run tests/bench/memory.exs work|lists

for file <- ["figures.exs", "batch.exs", "resident.exs"], do: Code.require_file(file, __DIR__)

defmodule Bench.Memory do
  alias Bench.{Batch, Figures, Resident}
  alias Tinkex.CustomLoss

  def run([what]) do
    {:ok, pool} = CustomLoss.start_link(await_ready: true)
    pids = Resident.pids(pool)
    # The first call loads what all need.
    for loss <- [:l2, :work], do: compute(pool, Batch.new(1_000), loss)

    {datums, length, beam_target, python_target} =
      if what == "work", do: {512, 8_192, 5, 5}, else: {1_024, 1_024, 16, nil}

    payload = 4 * datums * length
    idle = Resident.settled(pids)

    # In a process of its own, whose end drops the batch and the answer. It begins with room for the
    # batch, since a heap that grows to it leaves others behind, which the BEAM keeps for a while.
    room = if what == "lists", do: 5 * datums * length, else: 100_000
    main = self()

    :erlang.spawn_opt(
      fn ->
        call = call(pool, Batch.new(datums * length, datums), what)
        with_batch = Resident.settled(pids)
        Resident.reset_most(pids)
        {:ok, _output} = call.()
        send(main, {with_batch, Resident.most(pids)})
      end,
      [:link, min_heap_size: room]
    )

    {with_batch, most} = receive(do: ({_with_batch, _most} = sizes -> sizes))
    Process.sleep(1_000)
    kept = Resident.now(pids)
    over = fn sizes, name -> (sizes[name] - idle[name]) / payload end

    Figures.detail(
      "memory_#{what}: a payload is #{div(payload, 1_000)} kB; with the batch alone " <>
        "the BEAM has #{Figures.digits(over.(with_batch, :beam))}"
    )

    for {name, target} <- [beam: beam_target, python: python_target],
        do: Figures.figure("memory_#{what}_#{name}", over.(most, name), target)

    Figures.figure("memory_#{what}_beam_kept", over.(kept, :beam), 1)
    Figures.figure("memory_#{what}_python_kept", over.(kept, :python))
    Figures.figure("memory_#{what}_shared", Resident.shared(pids) / payload)
  end

  defp call(pool, batch, "lists") do
    logprobs = Enum.map(batch.logprobs, &Batch.list/1)
    fn -> CustomLoss.compute(pool, nil, logprobs, Batch.options(:l2)) end
  end

  defp call(pool, batch, "work") do
    :erlang.garbage_collect()
    fn -> compute(pool, batch, :work) end
  end

  defp compute(pool, batch, loss) do
    {:ok, _} =
      CustomLoss.compute(
        pool,
        Batch.data(batch, loss),
        Batch.logprobs(batch),
        Batch.options(loss)
      )
  end
end

Bench.Memory.run(System.argv())
