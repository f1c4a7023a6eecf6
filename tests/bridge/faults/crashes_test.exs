defmodule Tinkex.CustomLoss.Faults.CrashesTest do
  # A process that ends, or no longer serves: who is told what, and who is not troubled.
  use ExUnit.Case, async: true

  import Tinkex.CustomLoss.Bridge

  alias Tinkex.CustomLoss
  alias Tinkex.CustomLoss.WorkerError

  test "a request that ends workers takes no other with it: those are tried again, alone" do
    pool = start_peers!("dies_late_of_step_1.py", workers: 2, max_in_flight: 8)
    await_all(pool)
    before = os_pids(pool)
    innocent = for step <- 20..26, do: Task.async(fn -> ask(pool, step) end)
    eventually(fn -> match?({:ok, %{in_flight: 7}}, CustomLoss.info(pool)) end)
    culprit = Task.async(fn -> ask(pool, 1) end)

    assert {:error, %WorkerError{reason: {:lost, [{:exited, 139}, {:exited, 139}]}}} =
             Task.await(culprit)

    assert Enum.map(innocent, &Task.await/1) == Enum.map(20..26, &{:ok, &1 * 1.0})
    assert_serving(pool)
    assert_gone(before -- os_pids(pool))
  end

  test "a request that ends two workers is given up at once, if there are two" do
    pool = start_peers!("dies_of_step_1.py", workers: 2, backoff: {5_000, 5_000})
    await_all(pool)
    before = os_pids(pool)
    {ms, answer} = timed(fn -> ask(pool, 1) end)
    assert {:error, %WorkerError{reason: {:lost, [_, _]}} = error} = answer
    assert Exception.message(error) =~ "look for a crash in native code"
    assert ms < 4_000
    assert_gone(before)
  end

  test "a part of a frame, and then nothing, does not hold a request without a deadline" do
    pool = start_peers!("writes_half_a_frame.py", ping_interval: 25)
    [os_pid] = os_pids(pool)
    {ms, answer} = timed(fn -> ask(pool, 1, timeout: :infinity) end)
    assert {:error, %WorkerError{reason: {:lost, [:unresponsive, :unresponsive]}}} = answer
    assert ms < 5_000
    assert_gone(os_pid)
    assert_serving(pool)
  end

  @tag :tmp_dir
  test "a process that is stopped while it computes is replaced", %{tmp_dir: dir} do
    env = %{"STOPS_ONCE" => Path.join(dir, "stopped")}
    pool = start_peers!("stops_when_busy.py", env: env, ping_interval: 25)
    [os_pid] = os_pids(pool)
    assert ask(pool, 1, timeout: :infinity) == {:ok, 1.0}
    assert_gone(os_pid)
    assert_serving(pool)
  end

  test "a process that ends when the pool is full, and the queue, loses nothing" do
    pool = start_peers!("behaves.py", max_in_flight: 2, max_queue: 1_000)
    callers = for step <- 1..500, do: Task.async(fn -> ask(pool, step) end)
    [os_pid] = os_pids(pool)
    signal(os_pid, "KILL")
    assert Enum.map(callers, &Task.await/1) == Enum.map(1..500, &{:ok, &1 * 1.0})
    assert_gone(os_pid)
    assert_serving(pool)
  end

  test "what kills the Erlang process of a worker costs its callers one retry" do
    pool = start_peers!("stops_when_cancelled.py", workers: 2)
    await_all(pool)
    before = os_pids(pool)
    caller = Task.async(fn -> ask(pool, 1, timeout: 1_000) end)
    eventually(fn -> match?({:ok, %{in_flight: 1}}, CustomLoss.info(pool)) end)

    {_, workers, _, _} = List.keyfind(Supervisor.which_children(pool), :workers, 0)
    for {_, worker, _, _} <- Supervisor.which_children(workers), do: Process.exit(worker, :kill)

    # It is held by the next one, too, until its deadline.
    assert {:error, %CustomLoss.TimeoutError{}} = Task.await(caller)
    assert_gone(before)
    assert_serving(pool)
  end
end
