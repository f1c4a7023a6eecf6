defmodule Tinkex.CustomLoss.Faults.OrphansTest do
  # Nothing outlives a BEAM that is killed, or a worker that is stopped.
  use ExUnit.Case, async: false

  import Tinkex.CustomLoss.Bridge

  alias Tinkex.CustomLoss

  @moduletag timeout: 300_000

  @files ["pathological.py", "starts_processes.py", "holds_the_interpreter.py"]

  # What a worker is brought to do before it ends: calls that return, and one that does not.
  @states %{
    "idle" => {[], nil},
    "awaiting" => {[], "pathological:never_resolves"},
    "stopped, and its guardian too" => {[], nil},
    "blocked in a sleep" => {[], "pathological:sleeps"},
    "in a tight loop" => {[], "pathological:loops"},
    "holding the interpreter's lock" => {[], "holds_the_interpreter:holds_the_interpreter"},
    "with processes of all kinds" => {["starts_processes:starts_processes"], nil},
    "with a thread that is no daemon" => {["starts_processes:starts_a_thread"], nil},
    "with all of it" =>
      {["starts_processes:starts_processes", "starts_processes:starts_a_thread"],
       "holds_the_interpreter:holds_the_interpreter"}
  }

  test "when the BEAM is killed, whatever the workers are doing" do
    states = Map.delete(@states, "with all of it")
    peer = start_beam!()
    {:ok, python} = CustomLoss.Pool.Python.find(nil)

    groups =
      :peer.call(peer, Tinkex.CustomLoss.Bridge, :occupy_all, [python, @files, states], 240_000)

    for {state, os_pid} <- groups do
      assert length(group(os_pid)) >= if(state == "with processes of all kinds", do: 5, else: 1)
    end

    signal("-#{Map.new(groups)["stopped, and its guardian too"]}", "STOP")
    killed = System.monotonic_time(:millisecond)
    signal(:peer.call(peer, :os, :getpid, []), "KILL")

    for {state, os_pid} <- groups do
      left = 2_000 - (System.monotonic_time(:millisecond) - killed)
      eventually(fn -> group(os_pid) == [] end, left, "a worker is left: #{state}")
    end
  end

  # Stopped, it cannot see that nobody is there; and no pool looks after it.
  test "when the BEAM of a sandbox is killed" do
    peer = start_beam!()
    {:ok, sandbox} = :peer.call(peer, CustomLoss.Sandbox, :start_link, [], 60_000)
    %{port: port} = :peer.call(peer, :sys, :get_state, [sandbox])
    {:os_pid, os_pid} = :peer.call(peer, :erlang, :port_info, [port, :os_pid])
    signal(os_pid, "STOP")
    signal(:peer.call(peer, :os, :getpid, []), "KILL")
    assert_gone(os_pid)
  end

  # The emulator writes out what its ports hold before it halts.
  test "when the BEAM halts while a worker leaves 16 MB unread" do
    code = """
    {:ok, pool} =
      Tinkex.CustomLoss.start_link(python: #{inspect(fixture("never_reads.py"))}, await_ready: true)

    {:ok, %{workers: [%{os_pid: os_pid}]}} = Tinkex.CustomLoss.info(pool)
    logprobs = [{:binary.copy(<<0::32>>, 4_194_304), [4_194_304]}]
    Tinkex.CustomLoss.compute(pool, nil, logprobs, base_loss: :l2, timeout: 200)
    IO.puts(os_pid)
    System.halt(0)
    """

    paths = Enum.flat_map(:code.get_path(), &["-pa", to_string(&1)])
    task = Task.async(fn -> System.cmd("elixir", paths ++ ["-e", code]) end)
    assert {:ok, {os_pid, 0}} = Task.yield(task, 30_000)
    assert_gone(String.trim(os_pid))
  end

  describe "when a worker is stopped" do
    setup do
      %{pool: start_terms!(@files)}
    end

    test "with its pool, in the worst of states", %{pool: pool} do
      {calls, stuck} = @states["with all of it"]
      os_pid = occupy(pool, calls, stuck)
      assert length(group(os_pid)) >= 5
      stop_supervised!({CustomLoss, nil})
      assert_gone(os_pid)
    end

    test "by a signal, with what it started; three calls succeed", %{pool: pool} do
      os_pid = occupy(pool, ["starts_processes:starts_processes"], nil)

      for name <- ["TERM", "SEGV", "KILL"] do
        [os_pid | _] = if name == "TERM", do: [os_pid], else: os_pids(pool)
        signal(os_pid, name)
        assert_gone(os_pid)
        assert_squaring(pool)
      end
    end
  end
end
