defmodule Tinkex.CustomLoss.Faults.LimitsTest do
  # Frames that are, or claim to be, too much for either side; and too many requests.
  use ExUnit.Case, async: true

  import Tinkex.CustomLoss.Bridge

  alias Tinkex.CustomLoss
  alias Tinkex.CustomLoss.{Options, OverloadedError}
  alias Tinkex.CustomLoss.Pool.Python
  alias Tinkex.CustomLoss.Wire.{MessagePack, Protocol}
  alias Tinkex.CustomLoss.{RequestError, WorkerError}

  @moduletag timeout: 120_000

  @mib 1024 * 1024

  for {step, sentence} <- [
        {1, "an array of 4294967295 items, but bytes left: 5"},
        {2, "a map of 4294967295 entries, but bytes left: 5"},
        {3, "the frame ends in the middle of a value"},
        {4, "the frame ends in the middle of a value"},
        {5, "values nest deeper than 64 levels"},
        {6, "there are more than 1048576 values"}
      ] do
    test "a worker's bomb #{step} is refused, and the worker replaced" do
      pool = start_peers!("sends_bombs.py")
      [os_pid] = os_pids(pool)
      before = :erlang.memory(:total)

      assert {:error, %WorkerError{reason: {:lost, [{:protocol, sentence}, _]}}} =
               ask(pool, unquote(step))

      assert sentence =~ unquote(sentence)
      assert :erlang.memory(:total) - before < 256 * @mib
      assert_gone(os_pid)
      assert_serving(pool)
    end
  end

  test "bombs for the worker are refused, and the worker goes on" do
    config = Options.start!([])
    {:ok, port, os_pid} = Python.open(config, Python.worker_args(config))
    assert {:ready, _} = next(port)
    before = resident(os_pid)

    for bomb <- [
          <<0xDD, 0xFFFFFFFF::32, 0::40>>,
          <<0xDF, 0xFFFFFFFF::32, 0::40>>,
          <<0xC6, 0xFFFFFFFF::32, 0::40>>,
          <<0xDB, 0xFFFFFFFF::32, 0::40>>,
          <<0xC9, 0xFFFFFFFF::32, 5, 0::32>>,
          :binary.copy(<<0x91>>, 100_000),
          [<<0xDD, 0x200000::32>>, :binary.copy(<<0xC0>>, 0x200000)],
          # A batch of 2^62 values in no bytes.
          MessagePack.encode(%{
            "op" => "compute",
            "id" => 7,
            "logprobs" => %{
              "data" => [0, 0],
              "dtype" => "float32",
              "shapes" => {:bin, <<2::32-little, 0x80000000::32-little, 0x80000000::32-little>>}
            },
            "regularizers" => []
          })
        ] do
      Port.command(port, bomb)
      assert {:error, id, %{kind: kind}} = next(port)
      assert {id, kind} in [{nil, :protocol}, {7, :request}]
      Port.command(port, Protocol.encode_ping(1))
      assert {:result, 1, %{rss: rss}} = next(port)
      assert rss - before < 128 * @mib
    end

    Port.close(port)
    assert_gone(os_pid)
  end

  defp next(port) do
    assert_receive {^port, {:data, frame}}, 60_000

    case Protocol.decode(frame) do
      {:log, _record} -> next(port)
      message -> message
    end
  end

  test "a request over max_frame is refused before it is sent, with its size, and at once" do
    pool = start_peers!("behaves.py", max_frame: @mib)
    [os_pid] = os_pids(pool)

    {ms, answer} =
      timed(fn ->
        CustomLoss.compute(pool, nil, [{<<0::size(32_000_000)>>, [1_000_000]}], base_loss: :l2)
      end)

    assert {:error, %RequestError{reason: sentence}} = answer
    assert sentence =~ ~r/takes 40001\d\d bytes, more than the 1048576 of :max_frame/
    assert ms < 1_000
    assert_serving(pool)
    assert os_pids(pool) == [os_pid]
  end

  test "overload is said at once, to those beyond the queue and to nobody else" do
    pool = start_peers!("stops_when_cancelled.py", max_in_flight: 2, max_queue: 3)
    for _ <- 1..2, do: spawn_link(fn -> ask(pool, 1, timeout: 2_000) end)
    eventually(fn -> match?({:ok, %{in_flight: 2}}, CustomLoss.info(pool)) end)
    queued = for step <- 2..4, do: Task.async(fn -> ask(pool, step) end)
    eventually(fn -> match?({:ok, %{queued: 3}}, CustomLoss.info(pool)) end)

    for _ <- 1..20 do
      # Before anybody else had an answer.
      assert {:error, %OverloadedError{in_flight: 2, queued: 3}} = ask(pool, 5)
    end

    assert Enum.map(queued, &Task.await/1) == [ok: 2.0, ok: 3.0, ok: 4.0]
    assert_serving(pool)
  end

  test "overload while no worker is ready yet is the same" do
    pool = start_peers!("never_ready.py", await_ready: false, max_queue: 3)
    waiting = for _ <- 1..3, do: spawn(fn -> ask(pool, 1) end)
    eventually(fn -> match?({:ok, %{queued: 3}}, CustomLoss.info(pool)) end)
    assert {:error, %OverloadedError{in_flight: 0, queued: 3}} = ask(pool, 2)
    for pid <- waiting, do: Process.exit(pid, :kill)
    eventually(fn -> match?({:ok, %{queued: 0}}, CustomLoss.info(pool)) end)
  end
end
