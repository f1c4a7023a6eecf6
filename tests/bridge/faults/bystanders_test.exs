defmodule Tinkex.CustomLoss.Faults.BystandersTest do
  # What one caller, one worker or one process does to the others: nothing.
  use ExUnit.Case, async: true

  import Tinkex.CustomLoss.Bridge

  alias Tinkex.CustomLoss
  alias Tinkex.CustomLoss.{TimeoutError, WorkerError}

  defp await_in_flight(pool, counts) do
    eventually(fn ->
      {:ok, info} = CustomLoss.info(pool)
      Enum.map(info.workers, & &1.in_flight) == counts
    end)
  end

  describe "while a worker is down for long" do
    # No worker comes back within these tests.
    setup do
      pool = start_peers!("stops_when_cancelled.py", workers: 2, backoff: {60_000, 60_000})
      await_all(pool)
      %{pool: pool}
    end

    test "one that computes serves the others, though a request waits to be tried again",
         %{pool: pool} do
      for _ <- 1..2, do: spawn_link(fn -> ask(pool, 1, timeout: :infinity) end)
      await_in_flight(pool, [1, 1])
      pool |> os_pids() |> hd() |> signal("SEGV")
      eventually(fn -> match?({:ok, %{in_flight: 1, queued: 1}}, CustomLoss.info(pool)) end)
      for _ <- 1..5, do: assert_serving(pool)
      assert {:ok, %{workers: [%{state: :down}, %{state: :ready}]}} = CustomLoss.info(pool)
    end

    test "one that tries a request again serves the others, too", %{pool: pool} do
      spawn_link(fn -> ask(pool, 1, timeout: :infinity) end)
      await_in_flight(pool, [1, 0])
      pool |> os_pids() |> hd() |> signal("SEGV")
      await_in_flight(pool, [0, 1])
      for _ <- 1..5, do: assert_serving(pool)
    end

    # The pool gives a worker requests until it hears that it was killed. Stopped, it reads none.
    test "one that computes answers what the other was killed with", %{pool: pool} do
      spawn_link(fn -> ask(pool, 1, timeout: :infinity) end)
      await_in_flight(pool, [1, 0])
      other = pool |> os_pids() |> List.last()
      signal(other, "STOP")
      caller = Task.async(fn -> ask(pool, 2) end)
      await_in_flight(pool, [1, 1])
      signal(other, "KILL")
      assert Task.await(caller) == {:ok, 2.0}
    end
  end

  describe "while a worker is never idle" do
    # It holds the step 2; the other one the step 1, and comes back with no Python that is gone.
    setup %{tmp_dir: dir} = tags do
      python = Path.join(dir, "python")
      File.ln_s!(fixture("holds_once.py"), python)
      env = %{"HELD" => Path.join(dir, "held")}
      backoff = Map.get(tags, :backoff, {10, 200})
      opts = [python: python, env: env, workers: 2, ping_interval: 60_000, backoff: backoff]
      pool = start_peers!("holds_once.py", opts)
      await_all(pool)
      File.rm!(python)
      %{pool: pool}
    end

    @describetag :tmp_dir
    @describetag :capture_log

    test "it takes what waits for one that does not start again", %{pool: pool} do
      caller = Task.async(fn -> ask(pool, 1) end)
      await_in_flight(pool, [1, 0])
      spawn_link(fn -> ask(pool, 2, timeout: :infinity) end)
      await_in_flight(pool, [1, 1])
      pool |> os_pids() |> hd() |> signal("SEGV")
      assert Task.await(caller) == {:ok, 1.0}
      assert {:ok, %{workers: [%{state: :down}, %{in_flight: 1}]}} = CustomLoss.info(pool)
      assert_serving(pool)
    end

    @tag backoff: {60_000, 60_000}
    test "it takes what was with another's overdue request", %{pool: pool} do
      overdue = Task.async(fn -> ask(pool, 1, timeout: 1_000) end)
      await_in_flight(pool, [1, 0])
      spawn_link(fn -> ask(pool, 2, timeout: :infinity) end)
      await_in_flight(pool, [1, 1])
      pool |> os_pids() |> hd() |> signal("STOP")
      other = Task.async(fn -> ask(pool, 3) end)
      await_in_flight(pool, [2, 1])
      assert {:error, %TimeoutError{}} = Task.await(overdue)
      assert Task.await(other) == {:ok, 3.0}
    end
  end

  @tag :tmp_dir
  test "who was lost twice, but never alone, is not given up", %{tmp_dir: dir} do
    env = %{"SEEN" => dir}
    opts = [env: env, workers: 2, backoff: {2_000, 2_000}]
    pool = start_peers!("dies_of_company.py", opts)
    await_all(pool)
    lost = Task.async(fn -> ask(pool, 1) end)
    eventually(fn -> File.exists?(Path.join(dir, "another")) end)
    joins = Task.async(fn -> ask(pool, 2) end)
    assert Task.await_many([lost, joins], 30_000) == [{:ok, 1.0}, {:ok, 2.0}]
    assert_serving(pool)
  end

  describe "a pipe that is full" do
    @tag :tmp_dir
    test "is not sent what was withdrawn, and a cancel comes after its request", %{tmp_dir: dir} do
      env = %{"TOLD" => Path.join(dir, "told"), "READ" => Path.join(dir, "read")}
      pool = start_peers!("reads_when_told.py", env: env, grace: 60_000)
      [os_pid] = os_pids(pool)
      logprobs = [{:binary.copy(<<0::32>>, 4_194_304), [4_194_304]}]
      opts = [base_loss: :l2, step: 1, timeout: 300]

      1..4
      |> Enum.map(fn _ -> Task.async(fn -> CustomLoss.compute(pool, nil, logprobs, opts) end) end)
      |> Task.await_many(10_000)
      |> Enum.each(&assert({:error, %TimeoutError{stage: :computing}} = &1))

      # Nothing is left but the one of which a part is in the pipe.
      eventually(fn -> match?({:ok, %{in_flight: 1}}, CustomLoss.info(pool)) end)
      File.write!(env["TOLD"], "")
      assert_serving(pool)
      assert ["compute " <> id, "cancel " <> id | others] = env["READ"] |> File.read!() |> lines()
      assert [_, _, _] = others
      assert os_pids(pool) == [os_pid]
    end

    defp lines(text), do: String.split(text, "\n", trim: true)
  end

  describe "a stray message" do
    test "is nothing to any process of a pool" do
      pool = start_peers!("behaves.py", workers: 2)
      await_all(pool)
      before = os_pids(pool)

      for process <- processes(pool) do
        send(process, :stray)
        send(process, {make_ref(), :stray})
        send(process, {:EXIT, self(), :stray})
        send(process, {:DOWN, make_ref(), :process, self(), :stray})
        GenServer.cast(process, :stray)
        catch_exit(GenServer.call(process, :stray, 50))
      end

      assert_serving(pool)
      assert os_pids(pool) == before
      assert {:ok, %{workers: [%{restarts: 0}, %{restarts: 0}]}} = CustomLoss.info(pool)
    end
  end

  describe "a process of the pool that is killed" do
    @tag :tmp_dir
    test "costs a call one retry, and the pool is whole again", %{tmp_dir: dir} do
      env = %{"HELD" => Path.join(dir, "held")}
      pool = start_peers!("holds_once.py", env: env)
      before = os_pids(pool)
      caller = Task.async(fn -> ask(pool, 1) end)
      eventually(fn -> File.exists?(env["HELD"]) end)
      pool |> child(CustomLoss.Pool) |> Process.exit(:kill)
      assert Task.await(caller) == {:ok, 1.0}
      assert_gone(before)
      assert_serving(pool)
    end

    test "is no such cost, if it is the shell that kills: there is another one" do
      pool = start_peers!("behaves.py")
      [os_pid] = os_pids(pool)
      shell = :sys.get_state(child(pool, CustomLoss.Pool)).reaper
      {:os_pid, shell} = Port.info(shell, :os_pid)
      signal(shell, "KILL")
      eventually(fn -> not alive?(shell) end)
      assert_serving(pool)
      assert os_pids(pool) == [os_pid]
      signal(os_pid, "STOP")
      stop_supervised!({CustomLoss, nil})
      assert_gone(os_pid)
    end

    @tag :capture_log
    test "too often ends the pool, and leaves nothing of it" do
      Process.flag(:trap_exit, true)
      {:ok, pool} = CustomLoss.start_link(python: fixture("behaves.py"))

      for _ <- 1..4, process = Process.alive?(pool) && child(pool, CustomLoss.Pool) do
        monitor = Process.monitor(process)
        Process.exit(process, :kill)
        assert_receive {:DOWN, ^monitor, _, _, _}, 5_000
        eventually(fn -> not Process.alive?(pool) or child(pool, CustomLoss.Pool) != process end)
      end

      assert_receive {:EXIT, ^pool, :shutdown}, 5_000
      assert {:error, %WorkerError{}} = ask(pool, 1)
      eventually(fn -> not Enum.any?(:persistent_term.get(), &match?({{_, ^pool}, _}, &1)) end)
    end

    defp child(supervisor, id) do
      {_, pid, _, _} = List.keyfind(Supervisor.which_children(supervisor), id, 0)
      is_pid(pid) && pid
    catch
      :exit, _ended -> nil
    end
  end

  test "a caller that ends after its deadline does not give the worker more time" do
    pool = start_peers!("ignores_cancel.py", grace: 3_000)
    [os_pid] = os_pids(pool)

    spawn(fn ->
      {:error, %TimeoutError{}} = ask(pool, 1, timeout: 100)
      Process.sleep(2_000)
    end)

    # 3.1 s, where it would be 5.1.
    {ms, :ok} = timed(fn -> eventually(fn -> not alive?(os_pid) end, 10_000) end)
    assert ms < 4_100
  end

  describe "drain/2" do
    test "takes no more, and returns when all that was taken is answered" do
      pool = start_peers!("stops_when_cancelled.py", max_in_flight: 1)
      slow = Task.async(fn -> ask(pool, 1, timeout: 1_000) end)
      eventually(fn -> match?({:ok, %{in_flight: 1}}, CustomLoss.info(pool)) end)
      queued = Task.async(fn -> ask(pool, 2) end)
      eventually(fn -> match?({:ok, %{queued: 1}}, CustomLoss.info(pool)) end)

      assert {:error, %TimeoutError{stage: :draining}} = CustomLoss.drain(pool, 50)
      assert {:error, %WorkerError{reason: :draining} = error} = ask(pool, 3)
      assert Exception.message(error) =~ "is being drained"
      assert CustomLoss.drain(pool) == :ok
      assert {:ok, %{in_flight: 0, queued: 0}} = CustomLoss.info(pool)
      assert {:error, %TimeoutError{}} = Task.await(slow)
      assert Task.await(queued) == {:ok, 2.0}
    end
  end

  describe "reload/2" do
    @describetag :tmp_dir

    for workers <- [1, 2] do
      test "starts all of #{workers} workers anew without a lost call", %{tmp_dir: dir} do
        env = %{"VERSION" => Path.join(dir, "version")}
        File.write!(env["VERSION"], "0")
        pool = start_peers!("versioned.py", env: env, workers: unquote(workers))
        await_all(pool)
        before = os_pids(pool)
        callers = for _ <- 1..8, do: Task.async(fn -> ask_until(pool, 0.5) end)
        File.write!(env["VERSION"], "0.5")
        assert CustomLoss.reload(pool) == :ok
        assert before -- os_pids(pool) == before
        assert ask(pool, 1) == {:ok, 1.5}
        for answers <- Task.await_many(callers), do: assert(answers -- [{:ok, 1.0}] == [])
      end
    end

    # The answers before the first that has the new version.
    defp ask_until(pool, version) do
      case ask(pool, 1) do
        {:ok, loss} when loss == 1 + version -> []
        other -> Enum.uniq([other | ask_until(pool, version)])
      end
    end

    test "waits for what the first worker has, and gives it no more" do
      pool = start_peers!("stops_when_cancelled.py")
      [os_pid] = os_pids(pool)
      slow = spawn(fn -> ask(pool, 1, timeout: :infinity) end)
      eventually(fn -> match?({:ok, %{in_flight: 1}}, CustomLoss.info(pool)) end)
      reload = Task.async(fn -> CustomLoss.reload(pool) end)
      process = child(pool, CustomLoss.Pool)
      eventually(fn -> match?(%{reloading: [_]}, :sys.get_state(process)) end)
      next = Task.async(fn -> ask(pool, 2) end)
      eventually(fn -> match?({:ok, %{in_flight: 1, queued: 1}}, CustomLoss.info(pool)) end)
      assert os_pids(pool) == [os_pid]
      Process.exit(slow, :kill)
      assert Task.await(reload, 10_000) == :ok
      assert Task.await(next) == {:ok, 2.0}
      refute os_pids(pool) == [os_pid]
    end

    # What ended a worker is in its mailbox, and before what starts it anew.
    test "is not misled by a worker that ends just then" do
      pool = start_peers!("behaves.py")
      [os_pid] = os_pids(pool)
      process = child(pool, CustomLoss.Pool)
      [worker] = processes(pool) -- [process]
      :sys.suspend(worker)
      signal(os_pid, "KILL")
      eventually(fn -> Process.info(worker, :message_queue_len) != {:message_queue_len, 0} end)
      reload = Task.async(fn -> CustomLoss.reload(pool) end)
      eventually(fn -> match?(%{reloading: [_]}, :sys.get_state(process)) end)
      :sys.resume(worker)
      assert Task.await(reload, 10_000) == :ok
      assert_serving(pool)
    end

    @tag :capture_log
    test "says why the first one does not start, and leaves the others", %{tmp_dir: dir} do
      env = %{"VERSION" => Path.join(dir, "version")}
      File.write!(env["VERSION"], "0")
      pool = start_peers!("versioned.py", env: env, workers: 2)
      await_all(pool)
      [_, other] = os_pids(pool)
      File.write!(env["VERSION"], "no number")
      assert {:error, %WorkerError{reason: {:not_started, _}}} = CustomLoss.reload(pool)
      assert other in os_pids(pool)
      assert_serving(pool)
    end

    test "makes terms known that were written since", %{tmp_dir: dir} do
      path = Path.join(dir, "edited_#{System.unique_integer([:positive])}.py")
      term = "def NAME(data, logprobs):\n    return logprobs[0].sum(), {}\n"
      File.write!(path, String.replace(term, "NAME", "before"))
      pool = start_pool!(load: [path], await_ready: true)
      module = Path.basename(path, ".py")
      assert {:error, _} = CustomLoss.compute(pool, nil, [[1.0]], base_loss: "#{module}:later")
      File.write!(path, String.replace(term, "NAME", "later"))
      assert CustomLoss.reload(pool) == :ok
      assert {:ok, _} = CustomLoss.compute(pool, nil, [[1.0]], base_loss: "#{module}:later")
    end
  end

  test "a :max_rss that a worker is over when it starts is said, and no reason to go on so" do
    Process.flag(:trap_exit, true)
    opts = [max_rss: 100_000_000, await_ready: true, backoff: {60_000, 60_000}]
    assert {:error, %WorkerError{reason: {:not_started, sentence}}} = CustomLoss.start_link(opts)

    assert sentence =~
             ~r/starts with \d{9} bytes in memory, and :max_rss is 100000000: raise that/
  end

  test "a worker over :max_rss is started anew when it has finished what it has" do
    pool = start_peers!("grows.py", max_rss: 2_500, ping_interval: 50)
    [os_pid] = os_pids(pool)
    assert_serving(pool)
    eventually(fn -> match?({:ok, %{workers: [%{restarts: 1}]}}, CustomLoss.info(pool)) end)
    assert_gone(os_pid)
    assert ask(pool, 1) == {:ok, 1.0}
  end
end
