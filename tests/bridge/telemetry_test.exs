defmodule Tinkex.CustomLoss.TelemetryTest do
  # Puts a stand-in for :telemetry in place where the library is not.
  use ExUnit.Case, async: false

  import Tinkex.CustomLoss.Bridge

  alias Tinkex.CustomLoss

  setup_all do
    unless Code.ensure_loaded?(:telemetry) do
      Module.create(
        :telemetry,
        quote do
          def execute(event, measurements, metadata) do
            for {pid, _} <- :persistent_term.get(:telemetry_test, %{}),
                do: send(pid, {event, measurements, metadata})

            :ok
          end
        end,
        Macro.Env.location(__ENV__)
      )

      on_exit(fn ->
        :code.purge(:telemetry)
        :code.delete(:telemetry)
        :persistent_term.erase(:telemetry_test)
      end)
    end

    :ok
  end

  # With the real library, what it is asked to is what arrives.
  defp listen(events) do
    if function_exported?(:telemetry, :attach_many, 4) do
      me = self()

      handler = fn event, measurements, metadata, _ ->
        send(me, {event, measurements, metadata})
      end

      apply(:telemetry, :attach_many, [make_ref(), events, handler, nil])
    else
      :persistent_term.put(:telemetry_test, %{self() => true})
    end
  end

  test "the events of a step are Tinkex's" do
    pool = start_pool!(name: __MODULE__, load: [fixture("pathological.py")], await_ready: true)

    listen([
      [:tinkex, :custom_loss, :start],
      [:tinkex, :custom_loss, :stop],
      [:tinkex, :custom_loss, :exception],
      [:tinkex, :regularizer, :compute, :stop],
      [:tinkex, :regularizer, :compute, :exception]
    ])

    regularizers = [
      %{name: "squares", fn: "pathological:squares_async", weight: 0.5},
      %{name: "raises", fn: "pathological:raises", weight: 1.0, on_error: :skip}
    ]

    assert {:ok, _} = CustomLoss.compute(pool, nil, [[-3.0, -4.0]], regularizers: regularizers)

    assert_received {[:tinkex, :custom_loss, :start], %{system_time: _},
                     %{regularizer_count: 2, track_grad_norms: true}}

    assert_received {[:tinkex, :regularizer, :compute, :stop],
                     %{duration: duration, value: 25.0, contribution: 12.5, grad_norm: 10.0},
                     %{regularizer_name: "squares", weight: 0.5, async: true}}

    assert is_integer(duration) and duration > 0

    assert_received {[:tinkex, :regularizer, :compute, :exception], %{duration: _},
                     %{regularizer_name: "raises", reason: reason}}

    assert reason =~ "no such topology"

    assert_received {[:tinkex, :custom_loss, :stop],
                     %{duration: _, loss_total: 12.5, regularizer_total: 12.5},
                     %{regularizer_count: 2}}

    assert {:error, error} =
             CustomLoss.compute(pool, nil, [[-3.0]], base_loss: "pathological:raises")

    assert_received {[:tinkex, :custom_loss, :exception], %{duration: _}, %{reason: ^error}}

    # What is raised has an end as well as a start.
    error =
      assert_raise ArgumentError, ~r/`base_loss.params.x`/, fn ->
        CustomLoss.compute(pool, nil, [[-3.0]], base_loss: {:l2, x: {1, 2}})
      end

    assert_received {[:tinkex, :custom_loss, :exception], %{duration: _}, %{reason: ^error}}
  end

  test "a level that Logger does not have is refused when the logger is attached" do
    assert_raise ArgumentError, ~r/invalid value for :level of attach_logger\/1/, fn ->
      CustomLoss.Telemetry.attach_logger(level: :loud)
    end
  end

  test "the events of a pool say what is the matter with it" do
    listen(
      for event <- [[:worker, :up], [:worker, :down], [:queue], [:retry], [:deadline]],
          do: [:tinkex_custom_loss | event]
    )

    pool = start_peers!("dies_of_step_1.py", name: __MODULE__, max_in_flight: 1)
    assert_receive {[:tinkex_custom_loss, :worker, :up], %{duration: _}, up}
    assert %{pool: __MODULE__, worker: 1, os_pid: os_pid, versions: %{torch: "0"}} = up

    assert {:error, _} = ask(pool, 1)

    assert_received {[:tinkex_custom_loss, :worker, :down], %{delay: 10},
                     %{reason: {:exited, 139}, os_pid: ^os_pid}}

    assert_received {[:tinkex_custom_loss, :retry], %{count: 1}, %{reason: {:exited, 139}}}
    assert_received {[:tinkex_custom_loss, :queue], %{length: 1}, %{pool: __MODULE__}}

    stop_supervised!({CustomLoss, __MODULE__})
    pool = start_peers!("ignores_cancel.py", name: __MODULE__)
    assert {:error, _} = ask(pool, 1, timeout: 50)
    assert_received {[:tinkex_custom_loss, :deadline], %{timeout: 50}, %{stage: :computing}}
  end
end
