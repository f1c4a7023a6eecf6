defmodule Tinkex.CustomLoss.PoolTest do
  # Workers that misbehave in one way each, in bare Python: tests/bridge/fixtures.
  use ExUnit.Case, async: true

  import ExUnit.CaptureLog
  import Tinkex.CustomLoss.Bridge

  alias Tinkex.CustomLoss
  alias Tinkex.CustomLoss.{OverloadedError, RequestError, TimeoutError, WorkerError}
  alias Tinkex.CustomLoss.Pool.Handle

  describe "a pool" do
    test "answers many callers at once, each with its own answer" do
      pool = start_peers!("behaves.py", workers: 2)

      1..200
      |> Task.async_stream(&{&1, ask(pool, &1)}, max_concurrency: 32)
      |> Enum.each(fn {:ok, {step, answer}} -> assert answer == {:ok, step * 1.0} end)

      assert {:ok, %{in_flight: 0, queued: 0}} = CustomLoss.info(pool)
    end

    test "is found by its name, and by its pid" do
      pool = start_peers!("behaves.py", name: __MODULE__.Named)
      assert ask(__MODULE__.Named, 1) == {:ok, 1.0}
      assert ask(pool, 1) == {:ok, 1.0}
      assert ask({__MODULE__.Named, node()}, 1) == {:ok, 1.0}
    end

    test "that does not run is an error that says how to start it" do
      assert {:error, %WorkerError{reason: :not_running} = error} = ask(NoSuchPool, 1)
      assert Exception.message(error) =~ "{Tinkex.CustomLoss, name: NoSuchPool}"
    end

    test "starts at once, and calls wait for its first worker" do
      pool = start_peers!("behaves.py", await_ready: false)
      assert ask(pool, 5) == {:ok, 5.0}
    end

    test "gives the least loaded worker" do
      pool = start_peers!("stops_when_cancelled.py", workers: 2)

      eventually(fn ->
        match?({:ok, %{workers: [%{state: :ready}, %{state: :ready}]}}, CustomLoss.info(pool))
      end)

      slow = for _ <- 1..2, do: Task.async(fn -> ask(pool, 1, timeout: 1_000) end)

      eventually(fn ->
        {:ok, info} = CustomLoss.info(pool)
        Enum.map(info.workers, & &1.in_flight) == [1, 1]
      end)

      for task <- slow, do: assert({:error, %TimeoutError{}} = Task.await(task))
    end

    test "keeps what is beyond max_in_flight waiting, and refuses what is beyond max_queue" do
      pool = start_peers!("stops_when_cancelled.py", max_in_flight: 1, max_queue: 1)
      slow = Task.async(fn -> ask(pool, 1, timeout: 1_000) end)
      eventually(fn -> match?({:ok, %{in_flight: 1}}, CustomLoss.info(pool)) end)
      queued = Task.async(fn -> ask(pool, 2) end)
      eventually(fn -> match?({:ok, %{queued: 1}}, CustomLoss.info(pool)) end)

      assert {:error, %OverloadedError{in_flight: 1, queued: 1} = error} = ask(pool, 3)
      assert Exception.message(error) =~ ":max_queue"

      assert {:error, %TimeoutError{stage: :computing}} = Task.await(slow)
      assert Task.await(queued) == {:ok, 2.0}
      assert_serving(pool)
    end

    test "lets go of those who died in the queue" do
      pool = start_peers!("stops_when_cancelled.py", max_in_flight: 1)
      slow = Task.async(fn -> ask(pool, 1, timeout: 1_000) end)
      eventually(fn -> match?({:ok, %{in_flight: 1}}, CustomLoss.info(pool)) end)
      queued = spawn(fn -> ask(pool, 2) end)
      eventually(fn -> match?({:ok, %{queued: 1}}, CustomLoss.info(pool)) end)
      Process.exit(queued, :kill)
      eventually(fn -> match?({:ok, %{queued: 0}}, CustomLoss.info(pool)) end)
      Task.await(slow)
    end

    test "refuses a request that is larger than max_frame before it sends it" do
      pool = start_peers!("behaves.py", max_frame: 1_048_576)
      logprobs = [{:binary.copy(<<0::32>>, 300_000), [300_000]}]

      assert {:error, %RequestError{} = error} =
               CustomLoss.compute(pool, nil, logprobs, base_loss: :l2)

      assert Exception.message(error) =~
               ~r/takes 12\d{5} bytes, more than the 1048576 of :max_frame/

      assert_serving(pool)
    end
  end

  describe "the deadline" do
    test "holds, and the late answer reaches nobody" do
      pool = start_peers!("answers_after_deadline.py")
      {ms, answer} = timed(fn -> ask(pool, 1, timeout: 100) end)
      assert {:error, %TimeoutError{stage: :computing, timeout: 100}} = answer
      assert ms < 2_000
      assert_serving(pool)
      assert Process.info(self(), :messages) == {:messages, []}
      assert {:ok, %{in_flight: 0, workers: [%{restarts: 0}]}} = CustomLoss.info(pool)
    end

    test "cancels: a worker that stops goes on" do
      pool = start_peers!("stops_when_cancelled.py")
      before = os_pids(pool)
      assert {:error, %TimeoutError{}} = ask(pool, 1, timeout: 50)
      eventually(fn -> match?({:ok, %{in_flight: 0}}, CustomLoss.info(pool)) end)
      assert_serving(pool)
      assert os_pids(pool) == before
    end

    test "that is ignored ends the process, and the other requests are tried elsewhere" do
      pool = start_peers!("ignores_cancel.py", max_in_flight: 2)
      [os_pid] = os_pids(pool)
      stuck = Task.async(fn -> ask(pool, 1, timeout: 100) end)
      # It is in the same process when that is killed, and stuck in its replacement, too.
      other = Task.async(fn -> ask(pool, 1, timeout: 1_000) end)

      assert {:error, %TimeoutError{}} = Task.await(stuck)
      eventually(fn -> not alive?(os_pid) end)
      assert {:error, %TimeoutError{timeout: 1_000}} = Task.await(other)
      assert_serving(pool)
    end

    test "covers the queue" do
      pool = start_peers!("ignores_cancel.py", max_in_flight: 1, grace: 5_000)
      assert {:error, %TimeoutError{stage: :computing}} = ask(pool, 1, timeout: 50)
      {ms, answer} = timed(fn -> ask(pool, 2, timeout: 100) end)
      assert {:error, %TimeoutError{stage: :queued} = error} = answer
      assert ms < 2_000
      assert Exception.message(error) =~ "no worker had room"
    end

    test "covers the sending of a large frame to a worker that does not read" do
      pool = start_peers!("never_reads.py", workers: 1, grace: 60_000)
      [os_pid] = os_pids(pool)
      logprobs = [{:binary.copy(<<0::32>>, 4_194_304), [4_194_304]}]

      callers =
        for _ <- 1..3 do
          Task.async(fn ->
            timed(fn -> CustomLoss.compute(pool, nil, logprobs, base_loss: :l2, timeout: 300) end)
          end)
        end

      for caller <- callers do
        {ms, answer} = Task.await(caller)
        assert {:error, %TimeoutError{}} = answer
        assert ms < 10_000
      end

      # What it does when it is full: the small frames, too.
      {ms, answer} = timed(fn -> ask(pool, 2, timeout: 100) end)
      assert {:error, %TimeoutError{}} = answer
      assert ms < 2_000

      stop_supervised!({CustomLoss, nil})
      eventually(fn -> not alive?(os_pid) end, 2_000)
    end

    test "a worker that does not read is killed after the grace period" do
      pool = start_peers!("never_reads.py")
      [os_pid] = os_pids(pool)
      logprobs = [{:binary.copy(<<0::32>>, 1_000_000), [1_000_000]}]
      CustomLoss.compute(pool, nil, logprobs, base_loss: :l2, timeout: 50)
      eventually(fn -> not alive?(os_pid) end, 2_000)
    end
  end

  describe "a caller that dies" do
    test "cancels its request" do
      pool = start_peers!("stops_when_cancelled.py")
      before = os_pids(pool)
      caller = spawn(fn -> ask(pool, 1, timeout: :infinity) end)
      eventually(fn -> match?({:ok, %{in_flight: 1}}, CustomLoss.info(pool)) end)
      Process.exit(caller, :kill)
      eventually(fn -> match?({:ok, %{in_flight: 0}}, CustomLoss.info(pool)) end)
      assert os_pids(pool) == before
    end

    test "ends a worker that goes on with its request" do
      pool = start_peers!("ignores_cancel.py")
      [os_pid] = os_pids(pool)
      caller = spawn(fn -> ask(pool, 1, timeout: :infinity) end)
      eventually(fn -> match?({:ok, %{in_flight: 1}}, CustomLoss.info(pool)) end)
      Process.exit(caller, :kill)
      eventually(fn -> not alive?(os_pid) end)
      assert_serving(pool)
    end
  end

  describe "a worker that ends" do
    @tag :tmp_dir
    test "is replaced, and its request tried again", %{tmp_dir: dir} do
      env = %{"DIES_ONCE" => Path.join(dir, "died")}
      pool = start_peers!("dies_once.py", env: env)
      [os_pid] = os_pids(pool)
      assert ask(pool, 1) == {:ok, 1.0}
      refute os_pids(pool) == [os_pid]
      assert {:ok, %{workers: [%{restarts: 1}]}} = CustomLoss.info(pool)
      assert_serving(pool)
    end

    for workers <- [1, 2] do
      test "of a request twice is enough: #{workers} workers" do
        pool = start_peers!("dies_of_step_1.py", workers: unquote(workers))

        assert {:error, %WorkerError{reason: {:lost, [{:exited, 139}, {:exited, 139}]}} = error} =
                 ask(pool, 1)

        assert Exception.message(error) =~ "segmentation fault (signal 11)"
        assert Exception.message(error) =~ "given up after both workers"
        assert_serving(pool)
      end
    end

    test "after a junk frame is replaced" do
      pool = start_peers!("writes_junk.py")

      assert {:error, %WorkerError{reason: {:lost, [{:protocol, sentence}, _]}}} = ask(pool, 1)
      assert sentence =~ "not MessagePack"
      assert_serving(pool)
    end

    test "in the middle of a frame is replaced" do
      pool = start_peers!("truncates_a_frame.py")
      assert {:error, %WorkerError{reason: {:lost, [_, _]}}} = ask(pool, 1)
      assert_serving(pool)
    end

    test "because somebody killed it is replaced, when nobody calls, too" do
      pool = start_peers!("behaves.py")
      [os_pid] = os_pids(pool)
      System.cmd("/bin/sh", ["-c", "kill -KILL #{os_pid}"])

      eventually(fn ->
        match?({:ok, %{workers: [%{restarts: 1, state: :ready}]}}, CustomLoss.info(pool))
      end)

      assert_serving(pool)
    end

    test "because it gives no sign of life with nothing to do is replaced" do
      pool = start_peers!("ignores_pings.py", ping_interval: 50)
      [os_pid] = os_pids(pool)
      eventually(fn -> not alive?(os_pid) end)
      assert_serving(pool)
    end

    test "is said to the Logger, with the reason" do
      log =
        capture_log(fn ->
          pool = start_peers!("dies_of_step_1.py")
          ask(pool, 1)
        end)

      assert log =~ "segmentation fault"
      assert log =~ "The next one is started in 10 ms"
    end
  end

  describe "what is left" do
    test "is nothing, of the workers and of what they started" do
      pool = start_peers!("has_children.py", workers: 2)
      eventually(fn -> length(os_pids(pool)) == 2 end)
      {:ok, child} = ask(pool, 0)
      pids = [trunc(child) | os_pids(pool)]
      assert Enum.all?(pids, &alive?/1)
      stop_supervised!({CustomLoss, nil})
      eventually(fn -> not Enum.any?(pids, &alive?/1) end, 2_000)
    end

    test "is nothing when the pool is killed" do
      me = self()

      spawn(fn ->
        {:ok, pool} = CustomLoss.start_link(python: fixture("has_children.py"), await_ready: true)
        {:ok, child} = ask(pool, 0)
        send(me, {:started, pool, [trunc(child) | os_pids(pool)]})
        Process.sleep(:infinity)
      end)

      assert_receive {:started, pool, pids}, 10_000
      assert Enum.all?(pids, &alive?/1)
      Process.exit(pool, :kill)
      eventually(fn -> not Enum.any?(pids, &alive?/1) end, 2_000)
    end

    test "is nothing when the Erlang process of a worker is killed" do
      pool = start_peers!("has_children.py")
      {:ok, child} = ask(pool, 0)
      pids = [trunc(child) | os_pids(pool)]
      {_, worker, _, _} = worker(pool)
      Process.exit(worker, :kill)
      eventually(fn -> not Enum.any?(pids, &alive?/1) end, 2_000)
      assert {:ok, _other_child} = ask(pool, 0)
    end
  end

  describe "a Python that does not start" do
    test "because there is none says where it was looked for" do
      assert {:error, {{%WorkerError{reason: {:not_started, _}} = error, _}, _}} =
               start_supervised({CustomLoss, python: "/nowhere/python3", await_ready: true})
               |> flatten()

      assert Exception.message(error) ==
               "there is no Python at /nowhere/python3, which the option :python names: " <>
                 "correct or remove it"
    end

    test "fails calls at once, when nobody waited for it" do
      pool = start_pool!(python: "/nowhere/python3")
      assert {:error, %WorkerError{reason: {:not_started, sentence}}} = ask(pool, 1)
      assert sentence =~ "there is no Python at /nowhere/python3"
    end

    test "because it exits says with what status" do
      pool = start_pool!(python: fixture("exits_before_ready.py"), backoff: {60_000, 60_000})
      assert {:error, %WorkerError{} = error} = ask(pool, 1)
      assert Exception.message(error) =~ "exited with status 3 before it was ready"
    end

    @tag :tmp_dir
    test "and hangs when it is asked what it lacks is killed", %{tmp_dir: dir} do
      env = %{"PIDS" => Path.join(dir, "pid")}
      opts = [python: fixture("hangs_when_asked.sh"), env: env, start_timeout: 1_000]
      pool = start_pool!(opts ++ [backoff: {60_000, 60_000}])
      assert {:error, %WorkerError{reason: {:not_started, sentence}}} = ask(pool, 1)
      assert sentence =~ "did not end within 1.0 s, and was killed"
      env["PIDS"] |> File.read!() |> String.trim() |> String.to_integer() |> assert_gone()
    end

    test "because it says nothing is killed" do
      pool = start_pool!(python: fixture("never_ready.py"), start_timeout: 300)
      eventually(fn -> os_pids(pool) != [] end)
      [os_pid] = os_pids(pool)
      assert {:error, %WorkerError{} = error} = ask(pool, 1)
      assert Exception.message(error) =~ "was not ready after 0.3 s"
      eventually(fn -> not alive?(os_pid) end)
    end

    @tag :capture_log
    test "is waited for by whoever wants it ready, and said as what it is" do
      Process.flag(:trap_exit, true)
      opts = [python: fixture("never_ready.py"), start_timeout: 300, await_ready: true]
      assert {:error, %WorkerError{} = error} = CustomLoss.start_link(opts)
      assert Exception.message(error) =~ "was not ready after 0.3 s"
    end

    test "in our version of the protocol says which side is older" do
      pool = start_pool!(python: fixture("speaks_version_4.py"), backoff: {60_000, 60_000})
      assert {:error, %WorkerError{} = error} = ask(pool, 1)
      assert Exception.message(error) =~ "the Elixir package tinkex_custom_loss is older"
    end
  end

  # Such as in a container, where no LANG is set.
  test "a BEAM whose locale is not UTF-8 gives variables that are" do
    script = """
    {:ok, pool} =
      Tinkex.CustomLoss.start_link(
        python: #{inspect(fixture("behaves.py"))},
        env: %{"GREETING" => "\\u65e5\\u672c"},
        await_ready: true
      )

    {:ok, %{workers: [%{os_pid: os_pid}]}} = Tinkex.CustomLoss.info(pool)
    :latin1 = :file.native_name_encoding()
    true = File.read!("/proc/\#{os_pid}/environ") =~ "GREETING=\\u65e5\\u672c"
    IO.puts("given")
    """

    ebin = Application.app_dir(:tinkex_custom_loss, "ebin")
    opts = [env: [{"LC_ALL", "C"}, {"ELIXIR_ERL_OPTIONS", nil}], stderr_to_stdout: true]
    assert {output, 0} = System.cmd("elixir", ["-pa", ebin, "-e", script], opts)
    assert output =~ "given"
  end

  # The pool and a worker send without an order between the two, which only a stand-in can show.
  test "what an answer overtakes is left in nobody's mailbox" do
    caller = self()

    pool =
      spawn_link(fn ->
        receive do
          {_cast, {:request, %{reply_to: reply_to}}} ->
            :erlang.suspend_process(caller)
            CustomLoss.Pool.answer(reply_to, {:error, %WorkerError{reason: :draining}})
            CustomLoss.Pool.tell(reply_to, :granted)
            :erlang.resume_process(caller)
        end

        Process.sleep(:infinity)
      end)

    config = %{name: pool, max_frame: 1_048_576}
    Handle.publish(%Handle{supervisor: pool, pool: pool, config: config})
    Handle.forget_with(pool)

    assert {:error, %WorkerError{reason: :draining}} = ask(pool, 1)
    assert Process.info(self(), :messages) == {:messages, []}
  end

  # Only the start waits: whoever restarts a pool finds the supervisor at once, and calls wait.
  @tag :tmp_dir
  test "a pool that starts anew does not wait for a worker again", %{tmp_dir: dir} do
    env = %{"READY_ONCE" => Path.join(dir, "ready")}
    pool = start_peers!("ready_once.py", env: env, start_timeout: 60_000)
    [os_pid] = os_pids(pool)
    {_, process, _, _} = List.keyfind(Supervisor.which_children(pool), CustomLoss.Pool, 0)
    Process.exit(process, :kill)
    eventually(fn -> not alive?(os_pid) end)

    assert {:ok, children} =
             Task.yield(Task.async(fn -> Supervisor.which_children(pool) end), 10_000)

    assert {_, other, _, _} = List.keyfind(children, CustomLoss.Pool, 0)
    assert is_pid(other) and other != process
    assert {:error, %TimeoutError{stage: :queued}} = ask(pool, 1, timeout: 50)
  end

  @tag :tmp_dir
  test "log records that came faster than Logger takes them are left out", %{tmp_dir: dir} do
    env = %{"TOLD" => Path.join(dir, "told")}
    pool = start_peers!("floods_the_log.py", env: env)
    {_, worker, _, _} = worker(pool)

    log =
      capture_log(fn ->
        caller = Task.async(fn -> ask(pool, 1) end)
        eventually(fn -> match?({:ok, %{in_flight: 1}}, CustomLoss.info(pool)) end)
        # Logger could not be slower.
        :sys.suspend(worker)
        File.write!(env["TOLD"], "")

        eventually(fn ->
          Process.info(worker, :message_queue_len) > {:message_queue_len, 5_000}
        end)

        :sys.resume(worker)
        assert Task.await(caller) == {:ok, 1.0}
      end)

    assert log =~ ~r/[1-9]\d{3} log records of Python were left out/
    assert log =~ "record 9999"
  end

  defp worker(pool) do
    {_, workers, _, _} = List.keyfind(Supervisor.which_children(pool), :workers, 0)
    hd(Supervisor.which_children(workers))
  end

  defp flatten({:error, {error, child}}), do: {:error, {{error, child}, nil}}
end
