defmodule Tinkex.CustomLoss.NodesTest do
  # A pool on another node, called from here.
  use ExUnit.Case, async: false

  import Tinkex.CustomLoss.Bridge

  alias Tinkex.CustomLoss
  alias Tinkex.CustomLoss.{RequestError, TimeoutError, WorkerError}

  setup_all do
    unless Node.alive?() do
      # The daemon that tells nodes where the others listen; it may run already.
      System.cmd("epmd", ["-daemon"])
      {:ok, _} = Node.start(:"custom_loss_test_#{System.pid()}@127.0.0.1")
      on_exit(&Node.stop/0)
    end

    {:ok, peer, node} =
      :peer.start(%{
        name: :peer.random_name(),
        host: ~c"127.0.0.1",
        args: Enum.flat_map(:code.get_path(), &[~c"-pa", &1])
      })

    on_exit(fn -> :peer.stop(peer) end)
    {:ok, _} = :erpc.call(node, Application, :ensure_all_started, [:elixir])
    %{node: node, peer: peer}
  end

  defp start_there!(node, script) do
    opts = [name: Far, python: fixture(script), await_ready: true, grace: 300, backoff: {10, 200}]
    pid = Node.spawn(node, Tinkex.CustomLoss.Bridge, :keep_pool, [opts, self()])

    on_exit(fn ->
      Process.exit(pid, :shutdown)
      eventually(fn -> :erpc.call(node, Process, :whereis, [Far]) == nil end)
    end)

    assert_receive {:pool, pool}, 10_000
    pool
  end

  test "answers, by name and by pid", %{node: node} do
    pool = start_there!(node, "behaves.py")
    for server <- [{Far, node}, pool], do: assert(ask(server, 5) == {:ok, 5.0})
    assert {:ok, [%{name: "l2"}]} = CustomLoss.terms({Far, node})
    assert {:ok, %{workers: [%{state: :ready}]}} = CustomLoss.info({Far, node})
    assert {:error, %RequestError{}} = ask({Far, node}, 5, base_loss: :l3)

    # Refused by the process there, and raised here.
    assert_raise ArgumentError, ~r/`base_loss.params.x` is {1, 2}/, fn ->
      ask({Far, node}, 5, base_loss: {:l2, x: {1, 2}})
    end
  end

  test "keeps deadlines, and cancels there", %{node: node} do
    start_there!(node, "stops_when_cancelled.py")
    {ms, answer} = timed(fn -> ask({Far, node}, 1, timeout: 200) end)
    assert {:error, %TimeoutError{timeout: 200}} = answer
    assert ms < 2_000
    eventually(fn -> match?({:ok, %{in_flight: 0}}, CustomLoss.info({Far, node})) end)
    assert Process.info(self(), :messages) == {:messages, []}
  end

  test "cancels for a caller that died here", %{node: node} do
    start_there!(node, "stops_when_cancelled.py")
    caller = spawn(fn -> ask({Far, node}, 1, timeout: :infinity) end)
    eventually(fn -> match?({:ok, %{in_flight: 1}}, CustomLoss.info({Far, node})) end)
    Process.exit(caller, :kill)
    eventually(fn -> match?({:ok, %{in_flight: 0}}, CustomLoss.info({Far, node})) end)
  end

  test "that does not run, or is not reached, is an error", %{node: node} do
    assert {:error, %WorkerError{reason: :not_running}} = ask({Nobody, node}, 1)

    assert {:error, %WorkerError{reason: {:node, :"nobody@127.0.0.1", _}} = error} =
             ask({Far, :"nobody@127.0.0.1"}, 1)

    assert Exception.message(error) =~ "the node nobody@127.0.0.1"
  end
end
