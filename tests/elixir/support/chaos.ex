defmodule Tinkex.CustomLoss.Test.Chaos do
  @moduledoc """
  Many callers, few workers, and faults of every kind at random: who gets what answer, and what is
  left in the end.

  The faults are chosen by a seed. Logprobs are multiples of 1/8, for which Σ x² and 2x are exact in
  float32, so that an answer is right to the last bit or wrong.
  """

  import Bitwise

  alias Tinkex.CustomLoss
  alias Tinkex.CustomLoss.{Bridge, TermError, TimeoutError, WorkerError}
  alias Tinkex.CustomLoss.Pool.Python

  @callers 32
  @workers 2
  @long 120_000

  # Per ten thousand calls. Each of the first ones costs a worker or two, which take seconds to start.
  @fatal [
    segfaults: 4,
    calls_os_exit: 4,
    is_killed: 4,
    writes_to_the_stream: 4,
    sleeps: 4,
    swallows_interrupts: 4,
    killed_from_outside: 4,
    reloads: 8
  ]
  @others [
    raises: 300,
    calls_sys_exit: 300,
    returns_nan: 300,
    loops: 100,
    never_resolves: 100,
    caller_dies: 100,
    prints: 300,
    logs: 300,
    squares_async: 1_000,
    large: 50,
    large_of_catalogue: 50,
    withdraws_large: 50,
    strays: 100,
    forks: 50,
    returns_twice: 50
  ]

  @doc """
  Runs `calls` calls, prints what came of them, and returns the counts.

  Options: `:calls`, `:seed`, `:seconds` after which no more calls begin, and `:fatal`, how many times
  as often as in a long run a fault ends workers.
  """
  def run(opts) do
    calls = Keyword.fetch!(opts, :calls)
    seed = Keyword.fetch!(opts, :seed)
    mark = "chaos-#{System.pid()}-#{System.unique_integer([:positive])}"
    stop_at = System.monotonic_time(:second) + Keyword.get(opts, :seconds, 540)
    handle_telemetry = Bridge.handle_telemetry(CustomLoss.Telemetry.events(), &slow_handler/4)
    {:ok, supervisor} = Supervisor.start_link([pool_spec(mark)], strategy: :one_for_one)
    [{_id, pool, _, _}] = Supervisor.which_children(supervisor)

    before = weigh(pool)
    answers = run_calls(pool, calls, seed, faults(Keyword.get(opts, :fatal, 1)), stop_at)
    later = weigh(pool)
    {:ok, info} = CustomLoss.info(pool)
    Supervisor.stop(supervisor)
    handle_telemetry.()

    %{
      calls: Enum.sum(for {_fault, count} <- answers.asked, do: count),
      answers: Enum.sum(for {_outcome, count} <- answers.outcomes, do: count),
      wrong: length(answers.wrong),
      examples: Enum.take(answers.wrong, 5),
      asked: answers.asked,
      outcomes: answers.outcomes,
      orphans: orphans(mark),
      beam: {before.beam, later.beam},
      python: {before.python, later.python},
      restarts: Enum.sum(for worker <- info.workers, do: worker.restarts)
    }
  end

  @doc "The one line that says it all."
  def summary(result) do
    {beam, beam_later} = result.beam
    {python, python_later} = result.python

    "calls #{result.calls}, answers #{result.answers}, wrong #{result.wrong}, " <>
      "orphans #{result.orphans}, beam MiB #{beam} -> #{beam_later}, " <>
      "python MiB #{python} -> #{python_later}, restarts #{result.restarts}"
  end

  # Of what happens to a pool, which it must not wait for.
  defp slow_handler([:tinkex_custom_loss, event | _], _measurements, _metadata, _config)
       when event != :compute,
       do: Process.sleep(50)

  defp slow_handler(_event, _measurements, _metadata, _config), do: :ok

  defp pool_spec(mark) do
    {:ok, python} = Python.find(nil)

    {CustomLoss,
     python: Bridge.fixture("quiet_python.sh"),
     env: %{"REAL_PYTHON" => python, "CHAOS" => mark},
     load: [Bridge.fixture("pathological.py")],
     workers: @workers,
     max_queue: 1_000,
     grace: 500,
     backoff: {10, 200},
     await_ready: true}
  end

  defp faults(times), do: for({fault, n} <- @fatal, do: {fault, times * n}) ++ @others

  defp run_calls(pool, calls, seed, faults, stop_at) do
    per_caller = div(calls, @callers)

    1..@callers
    |> Enum.map(fn caller ->
      count = if caller <= rem(calls, @callers), do: per_caller + 1, else: per_caller

      Task.async(fn ->
        :rand.seed(:exsss, {seed, caller, 0})
        caller(pool, count, {faults, stop_at}, %{asked: %{}, outcomes: %{}, wrong: []})
      end)
    end)
    |> Task.await_many(:infinity)
    |> Enum.reduce(fn one, other ->
      Map.merge(one, other, fn
        :wrong, a, b -> a ++ b
        _counts, a, b -> Map.merge(a, b, fn _key, m, n -> m + n end)
      end)
    end)
  end

  defp caller(_pool, 0, _plan, seen), do: seen

  defp caller(pool, count, {faults, stop_at} = plan, seen) do
    if System.monotonic_time(:second) >= stop_at do
      seen
    else
      fault = pick(faults)
      outcome = call(pool, fault)
      wrong = if allowed?(fault, outcome), do: [], else: [{fault, outcome}]

      caller(pool, count - 1, plan, %{
        asked: Map.update(seen.asked, fault, 1, &(&1 + 1)),
        outcomes: Map.update(seen.outcomes, kind(outcome), 1, &(&1 + 1)),
        wrong: wrong ++ seen.wrong
      })
    end
  end

  defp pick(faults) do
    dice = :rand.uniform(10_000)

    Enum.reduce_while(faults, dice, fn {fault, weight}, left ->
      if left <= weight, do: {:halt, fault}, else: {:cont, left - weight}
    end)
    |> then(&if(is_atom(&1), do: &1, else: :none))
  end

  # One call, and what it came to: :right, {:wrong, answer}, or an exception.

  defp call(pool, :none), do: compute(pool, {:l2, %{reduction: "token_sum"}}, @long)
  defp call(pool, :large), do: compute(pool, "pathological:squares", @long, 100_000)

  # In shared memory, most of them: what a user's term is given is a copy, and this is not.
  defp call(pool, :large_of_catalogue),
    do: compute(pool, {:l2, %{reduction: "token_sum"}}, @long, 100_000)

  defp call(pool, fault) when fault in [:sleeps, :swallows_interrupts, :loops, :never_resolves],
    do: compute(pool, "pathological:#{fault}", 50 + :rand.uniform(100))

  defp call(pool, :caller_dies) do
    doomed = spawn(fn -> compute(pool, "pathological:never_resolves", :infinity) end)
    answer = call(pool, :none)
    Process.exit(doomed, :kill)
    answer
  end

  defp call(pool, :killed_from_outside) do
    with [_ | _] = os_pids <- Bridge.os_pids(pool),
         do: Bridge.signal(Enum.random(os_pids), "KILL")

    call(pool, :none)
  end

  defp call(pool, :withdraws_large) do
    rows = [{:binary.copy(<<0::32>>, 4_194_304), [4_194_304]}]
    opts = [base_loss: "pathological:loops", timeout: :rand.uniform(100)]
    with {:error, error} <- CustomLoss.compute(pool, nil, rows, opts), do: error
  end

  defp call(pool, :strays) do
    for process <- Bridge.processes(pool), do: send(process, {make_ref(), :stray})
    call(pool, :none)
  end

  defp call(pool, :reloads) do
    spawn(fn -> CustomLoss.reload(pool) end)
    call(pool, :none)
  end

  defp call(pool, fault), do: compute(pool, "pathological:#{fault}", @long)

  defp compute(pool, term, timeout, most \\ 50) do
    rows = for _ <- 1..:rand.uniform(4), do: for(_ <- 1..:rand.uniform(most), do: eighth())
    rows = if most > 1_000, do: Enum.take(rows, 1), else: rows
    expected = Enum.sum(for row <- rows, x <- row, do: x * x)

    case CustomLoss.compute(pool, nil, rows, base_loss: term, timeout: timeout) do
      {:ok, %{loss_total: loss, gradients: gradients}} ->
        if gradients == Enum.map(rows, fn row -> Enum.map(row, &(2 * &1)) end) and
             (loss == expected or (most > 1_000 and abs(loss / expected - 1) < 1.0e-5)),
           do: :right,
           else: {:wrong, {loss, expected}}

      {:error, error} ->
        error
    end
  end

  defp eighth, do: (:rand.uniform(1 <<< 7) - (1 <<< 6)) / 8

  # What each fault may come to. Whoever was on a worker that somebody else ended is tried again.
  defp allowed?(fault, :right)
       when fault in [
              :none,
              :large,
              :large_of_catalogue,
              :caller_dies,
              :killed_from_outside,
              :strays,
              :reloads
            ],
       do: true

  defp allowed?(fault, :right)
       when fault in [:prints, :logs, :squares_async, :forks, :returns_twice],
       do: true

  defp allowed?(fault, %TermError{}) when fault in [:raises, :calls_sys_exit, :returns_nan],
    do: true

  defp allowed?(fault, %WorkerError{reason: {:lost, [_, _ | _]}})
       when fault in [:segfaults, :calls_os_exit, :is_killed, :writes_to_the_stream],
       do: true

  defp allowed?(fault, %TimeoutError{})
       when fault in [:sleeps, :swallows_interrupts, :loops, :never_resolves, :withdraws_large],
       do: true

  # A bystander is lost only if it was tried again, alone, and that worker was killed from outside.
  defp allowed?(_any, %WorkerError{reason: {:lost, reasons}}),
    do: List.last(reasons) == {:exited, 137}

  defp allowed?(_fault, _outcome), do: false

  defp kind(:right), do: :right
  defp kind({:wrong, _}), do: :wrong
  defp kind(%module{}), do: module |> Module.split() |> List.last() |> String.to_atom()

  # Afterwards

  # When every worker has lately done the same, or a new one would weigh less than an old one.
  defp weigh(pool) do
    Bridge.await_all(pool)

    for fault <- [:large, :logs, :none] do
      1..(4 * @workers)
      |> Enum.map(fn _ -> Task.async(fn -> call(pool, fault) end) end)
      |> Task.await_many(:infinity)
    end

    for pid <- Process.list(), do: :erlang.garbage_collect(pid)
    os_pids = Bridge.os_pids(pool)

    %{
      beam: mebibytes(Bridge.resident(System.pid())),
      python: mebibytes(Enum.sum(Enum.map(os_pids, &Bridge.resident/1)))
    }
  end

  defp mebibytes(bytes), do: round(bytes / 1_048_576)

  # By their environment, which also those have that left the group of their worker.
  defp orphans(mark, patience \\ 2_000) do
    left =
      for file <- Path.wildcard("/proc/[0-9]*/environ"),
          {:ok, environment} <- [File.read(file)],
          String.contains?(environment, mark),
          do: file

    if left != [] and patience > 0 do
      Process.sleep(50)
      orphans(mark, patience - 50)
    else
      length(left)
    end
  end
end
