defmodule Tinkex.CustomLoss.TelemetryTest do
  use ExUnit.Case, async: false

  import ExUnit.CaptureLog
  import Tinkex.CustomLoss.Bridge

  alias Tinkex.CustomLoss

  defp listen(events) do
    me = self()
    listen(events, fn event, measures, metadata, _ -> send(me, {event, measures, metadata}) end)
  end

  defp listen(events, handler), do: on_exit(handle_telemetry(events, handler))

  @compute [:tinkex_custom_loss, :compute]
  @step [:tinkex, :custom_loss]
  @regularizer [:tinkex, :regularizer, :compute]

  defp compute!(opts, logprobs \\ [[-3.0, -4.0]]) do
    pool = start_pool!(name: __MODULE__, load: [fixture("pathological.py")], await_ready: true)
    listen(CustomLoss.Telemetry.events())
    CustomLoss.compute(pool, nil, logprobs, opts)
  end

  test "a computation is a span" do
    regularizers = [%{name: "squares", fn: "pathological:squares_async", weight: 0.5}]
    assert {:ok, _} = compute!(regularizers: regularizers, step: 7)

    assert_received {@compute ++ [:start], %{system_time: _, monotonic_time: start}, metadata}

    assert %{
             pool: __MODULE__,
             step: 7,
             gradients: true,
             regularizers: ["squares"],
             telemetry_span_context: context
           } = metadata

    assert_received {@compute ++ [:stop], measurements, stopped}
    assert %{"loss_total" => 12.5, "regularizers" => %{"squares" => _}} = stopped.record
    assert Map.drop(stopped, [:error, :record]) == metadata and stopped.error == nil
    assert %{loss_total: 12.5, regularizer_total: 12.5} = measurements
    assert measurements.monotonic_time - start == measurements.duration

    # Tinkex's events of this computation are told by the same context.
    for event <- [@step ++ [:start], @step ++ [:stop], @regularizer ++ [:stop]] do
      assert_received {^event, _, %{telemetry_span_context: ^context, pool: __MODULE__}}
    end
  end

  test "an error that is returned stops the span; what is raised is an exception" do
    assert {:error, error} = compute!(base_loss: "pathological:raises")
    assert_received {@compute ++ [:stop], stopped, %{error: ^error, pool: __MODULE__}}
    assert Map.keys(stopped) == [:duration, :monotonic_time]
    # As Tinkex's own logger has it: a step that failed.
    assert_received {@step ++ [:exception], %{duration: _}, %{reason: ^error}}

    error =
      assert_raise ArgumentError, ~r/`base_loss.params.x`/, fn ->
        CustomLoss.compute(__MODULE__, nil, [[-3.0]], base_loss: {:l2, x: {1, 2}})
      end

    assert_received {@compute ++ [:exception], %{duration: _, monotonic_time: _}, raised}
    assert %{kind: :error, reason: ^error, stacktrace: [_ | _], pool: __MODULE__} = raised
    assert_received {@step ++ [:exception], %{duration: _}, %{reason: ^error}}
    refute_received {@compute ++ [:exception], _, _}
    refute_received {@compute ++ [:stop], _, _}
  end

  test "every event says which pool by the name that it was given" do
    pool = start_pool!(name: {:global, __MODULE__}, await_ready: true)
    unnamed = start_supervised!({CustomLoss, await_ready: true}, id: :unnamed)
    listen(CustomLoss.Telemetry.events())
    square = &CustomLoss.compute(&1, nil, [[-1.0]], base_loss: :l2)

    for {server, name} <- [
          {pool, {:global, __MODULE__}},
          {{:global, __MODULE__}, {:global, __MODULE__}},
          {unnamed, unnamed}
        ] do
      assert {:ok, _} = square.(server)
      assert_received {@compute ++ [:stop], _, %{pool: ^name}}
      assert_received {@step ++ [:stop], _, %{pool: ^name}}
    end
  end

  test "the events of a step are Tinkex's" do
    regularizers = [
      %{name: "squares", fn: "pathological:squares_async", weight: 0.5},
      %{name: "raises", fn: "pathological:raises", weight: 1.0, on_error: :skip}
    ]

    assert {:ok, _} = compute!(regularizers: regularizers)

    assert_received {@step ++ [:start], %{system_time: _},
                     %{regularizer_count: 2, track_grad_norms: true}}

    assert_received {@regularizer ++ [:stop],
                     %{duration: duration, value: 25.0, contribution: 12.5, grad_norm: 10.0},
                     %{regularizer_name: "squares", weight: 0.5, async: true}}

    assert is_integer(duration) and duration > 0

    assert_received {@regularizer ++ [:exception], %{duration: _},
                     %{regularizer_name: "raises", reason: reason}}

    assert reason =~ "no such topology"

    assert_received {@step ++ [:stop], %{duration: _, loss_total: 12.5, regularizer_total: 12.5},
                     %{regularizer_count: 2}}

    # When a regularizer started nobody here knows.
    refute_received {@regularizer ++ [:start], _, _}
  end

  test "a level that Logger does not have is refused when the logger is attached" do
    assert_raise ArgumentError, ~r/invalid value for :level of attach_logger\/1/, fn ->
      CustomLoss.Telemetry.attach_logger(level: :loud)
    end
  end

  test "a table follows the events of its pool, and of no other" do
    on_exit(ensure_telemetry())
    pool = start_pool!(name: __MODULE__, await_ready: true)
    other = start_supervised!({CustomLoss, await_ready: true}, id: :other)

    text =
      ExUnit.CaptureIO.capture_io(fn ->
        opts = [pool: __MODULE__, total: 2, ansi: false, device: Process.group_leader()]
        live = start_supervised!({CustomLoss.Live, opts})
        send(live, :stray)
        for value <- [-1.0, -2.0], do: {:ok, _} = squared(pool, value)
        {:ok, _} = squared(other, -9.0)
        assert {:error, _} = CustomLoss.compute(pool, nil, [[-1.0]], base_loss: :no_such_term)
        stop_supervised!({CustomLoss.Live, __MODULE__})
      end)

    assert ["    0  loss 1 = base_loss 1", "    1  loss 4 = base_loss 4", "", _heads, base] =
             String.split(text, "\n", trim: false) |> Enum.take(5)

    assert base =~ ~r/^base_loss +4 .* ▁█$/u
    # Its handler went with it.
    {:ok, _} = squared(pool, -3.0)
  end

  defp squared(pool, value), do: CustomLoss.compute(pool, nil, [[value]], base_loss: :l2)

  test "there are metrics for a reporter, of events that there are" do
    if Code.ensure_loaded?(Telemetry.Metrics) do
      metrics = CustomLoss.Telemetry.metrics(pool: __MODULE__)
      events = CustomLoss.Telemetry.events()
      assert Enum.all?(metrics, &(&1.event_name in events))
      loss = Enum.find(metrics, &(List.last(&1.name) == :loss_total))
      assert %{tags: [:pool]} = loss
      assert %{pool: "{:global, :a}"} = loss.tag_values.(%{pool: {:global, :a}})
      assert loss.keep.(%{pool: __MODULE__}) and not loss.keep.(%{pool: Other})
    else
      assert_raise ArgumentError, ~r/add :telemetry_metrics to your dependencies/, fn ->
        CustomLoss.Telemetry.metrics()
      end
    end

    assert_raise ArgumentError, ~r/:pol/, fn -> CustomLoss.Telemetry.metrics(pol: 1) end
  end

  # What the logger of attach_logger/1 makes of all that was received.
  defp logged do
    receive do
      {[_ | _] = event, measurements, metadata} ->
        CustomLoss.EventLogger.handle_event(event, measurements, metadata, %{level: :info})
        logged()
    after
      0 -> :ok
    end
  end

  test "the log says in which pool what happened" do
    regularizers = [
      %{name: "squares", fn: "pathological:squares", weight: 0.5},
      %{name: "raises", fn: "pathological:raises", weight: 1.0, on_error: :skip}
    ]

    assert {:ok, _} = compute!(regularizers: regularizers)
    assert {:error, _} = CustomLoss.compute(__MODULE__, nil, [[-1.0]], base_loss: :l3)

    lines =
      capture_log([format: "[$level] $message\n"], &logged/0) |> String.split("\n", trim: true)

    pool = "Tinkex.CustomLoss #{inspect(__MODULE__)}: "

    assert [
             "[info] " <> squares,
             "[warn" <> raises,
             "[info] " <> step,
             "[warn" <> failure
           ] = lines

    assert squares =~ pool <> ~s(regularizer "squares": value 25.0, weight 0.5)
    assert raises =~ pool <> ~s(regularizer "raises" was left out: )
    assert step =~ pool <> "loss 12.5, of which 2 regularizers contribute 12.5, in "
    assert failure =~ pool <> "no loss after "
    assert failure =~ "there is no term :l3"
  end

  test "the events of a pool say what is the matter with it" do
    listen(
      for event <- [[:worker, :up], [:worker, :down], [:queue], [:retry], [:deadline]],
          do: [:tinkex_custom_loss | event]
    )

    pool = start_peers!("dies_of_step_1.py", name: __MODULE__, max_in_flight: 1)
    assert_receive {[:tinkex_custom_loss, :worker, :up], %{duration: _}, up}, 5_000
    assert %{pool: __MODULE__, worker: 1, os_pid: os_pid, versions: %{torch: "0"}} = up

    assert {:error, _} = ask(pool, 1)

    assert_received {[:tinkex_custom_loss, :worker, :down], %{delay: delay},
                     %{pool: __MODULE__, reason: {:exited, 139}, os_pid: ^os_pid}}

    assert delay == System.convert_time_unit(10, :millisecond, :native)

    assert_received {[:tinkex_custom_loss, :retry], %{count: 1}, %{reason: {:exited, 139}}}
    assert_received {[:tinkex_custom_loss, :queue], %{length: 1}, %{pool: __MODULE__}}

    stop_supervised!({CustomLoss, __MODULE__})
    pool = start_peers!("ignores_cancel.py", name: __MODULE__)
    assert {:error, _} = ask(pool, 1, timeout: 50)

    assert_received {[:tinkex_custom_loss, :deadline], %{timeout: timeout},
                     %{pool: __MODULE__, stage: :computing}}

    assert timeout == System.convert_time_unit(50, :millisecond, :native)
  end

  @tag :capture_log
  test "a handler that never returns delays its caller, and no other" do
    me = self()

    pool_events =
      for event <- [[:worker, :down], [:queue], [:retry]], do: [:tinkex_custom_loss | event]

    listen(pool_events, fn event, _measurements, _metadata, _ ->
      send(me, {:in_handler, event, self()})
      Process.sleep(:infinity)
    end)

    pool = start_peers!("dies_of_step_1.py", max_in_flight: 1)
    caller = spawn(fn -> ask(pool, 1) end)
    assert_receive {:in_handler, [:tinkex_custom_loss, :worker, :down], _process}, 5_000
    assert_receive {:in_handler, [:tinkex_custom_loss, :retry], ^caller}, 5_000
    # It is ended by itself, alone, so nobody else waits.
    await_all(pool)
    assert {:ok, %{workers: [%{restarts: 2}]}} = CustomLoss.info(pool)
    assert_serving(pool)
    Process.exit(caller, :kill)
  end
end
