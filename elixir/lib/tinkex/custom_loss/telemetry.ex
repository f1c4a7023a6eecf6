defmodule Tinkex.CustomLoss.Telemetry do
  @moduledoc """
  Events for `:telemetry`, which are executed when that library is there and cost nothing when not.

  Those of Tinkex, with its names, measurements and metadata, so that
  `Tinkex.Regularizer.Telemetry.attach_logger/1` and existing dashboards work as they are:

  | event | measurements | metadata |
  |---|---|---|
  | `[:tinkex, :custom_loss, :start]` | `system_time` | `regularizer_count`, `track_grad_norms` |
  | `[:tinkex, :custom_loss, :stop]` | `duration`, `loss_total`, `regularizer_total` | `regularizer_count` |
  | `[:tinkex, :custom_loss, :exception]` | `duration` | `regularizer_count`, `reason` (an exception struct) |
  | `[:tinkex, :regularizer, :compute, :start]` | `system_time` | `regularizer_name`, `weight`, `async` |
  | `[:tinkex, :regularizer, :compute, :stop]` | `duration`, `value`, `contribution`, `grad_norm` | `regularizer_name`, `weight`, `async` |
  | `[:tinkex, :regularizer, :compute, :exception]` | `duration` | `regularizer_name`, `weight`, `async`, `reason` |

  Those of the regularizers follow once the step is computed, since they are measured in Python: the
  `system_time` of their start is that of the step. The last event is `:exception` for one that was
  skipped, or whose value is not finite, `reason` being a sentence. Durations are in native time
  units. All have `pool`, the name of the pool, too.

  And those of the pool:

  | event | measurements | metadata |
  |---|---|---|
  | `[:tinkex_custom_loss, :worker, :up]` | `duration` of the start | `pool`, `worker`, `os_pid`, `versions` |
  | `[:tinkex_custom_loss, :worker, :down]` | `delay`, ms until the next start | `pool`, `worker`, `os_pid`, `reason` |
  | `[:tinkex_custom_loss, :queue]` | `length`, this one included | `pool` |
  | `[:tinkex_custom_loss, :retry]` | `count`, 1 | `pool`, `reason` the worker ended for |
  | `[:tinkex_custom_loss, :deadline]` | `timeout`, ms | `pool`, `stage` (`:queued`, `:computing`) |

  `reason` is as in `Tinkex.CustomLoss.WorkerError`, whose message puts it in words.

  To see them in the log, call `attach_logger/1`.
  """

  alias Tinkex.CustomLoss.{EventLogger, Output}

  @events [
    [:tinkex, :custom_loss, :start],
    [:tinkex, :custom_loss, :stop],
    [:tinkex, :custom_loss, :exception],
    [:tinkex, :regularizer, :compute, :start],
    [:tinkex, :regularizer, :compute, :stop],
    [:tinkex, :regularizer, :compute, :exception],
    [:tinkex_custom_loss, :worker, :up],
    [:tinkex_custom_loss, :worker, :down],
    [:tinkex_custom_loss, :queue],
    [:tinkex_custom_loss, :retry],
    [:tinkex_custom_loss, :deadline]
  ]

  @levels [:debug, :info, :notice, :warning, :error, :critical, :alert, :emergency]

  @doc "All events, for `:telemetry.attach_many/4`."
  @spec events() :: [[atom()]]
  def events, do: @events

  @doc """
  Logs what happens: a line a step, a line a regularizer, and the pool's troubles.

    * `:handler_id` - to `detach/1` with; one is made if it is not given
    * `:level` - of steps and regularizers, default `:info`. What went wrong is logged as `:warning`.

  Returns the handler's id. Raises `ArgumentError` if the library `:telemetry` is not there.
  """
  @spec attach_logger(keyword()) :: term()
  def attach_logger(opts \\ []) do
    level = Keyword.get(opts, :level, :info)
    id = Keyword.get(opts, :handler_id, {EventLogger, make_ref()})

    with [key | _] <- Keyword.keys(opts) -- [:level, :handler_id] do
      raise ArgumentError,
            "attach_logger/1 has no option #{inspect(key)}; " <>
              "its options are [:handler_id, :level]"
    end

    unless level in @levels do
      raise ArgumentError,
            "invalid value for :level of attach_logger/1: expected one of " <>
              "#{Enum.map_join(@levels, ", ", &inspect/1)}, got: #{inspect(level)}"
    end

    unless match?({:module, _}, load()) do
      raise ArgumentError, "there is no :telemetry to attach to: add it to your dependencies"
    end

    arguments = [id, @events, &EventLogger.handle_event/4, %{level: level}]

    case apply(:telemetry, :attach_many, arguments) do
      :ok -> id
      {:error, :already_exists} -> raise ArgumentError, "#{inspect(id)} is attached already"
    end
  end

  @doc "Ends what `attach_logger/1` began."
  @spec detach(term()) :: :ok | {:error, :not_found}
  def detach(id), do: apply(:telemetry, :detach, [id])

  @doc false
  # Runs a computation, {:ok, output, result of Call.run/3} or {:error, exception}, between events.
  def span(pool, request, fun) do
    start = System.monotonic_time()
    system_time = System.system_time()
    count = length(request.regularizers)

    execute(
      [:tinkex, :custom_loss, :start],
      %{system_time: system_time},
      %{pool: pool, regularizer_count: count, track_grad_norms: request.gradients}
    )

    metadata = %{pool: pool, regularizer_count: count}

    result =
      try do
        fun.()
      rescue
        error ->
          failed(error, start, metadata)
          reraise error, __STACKTRACE__
      end

    case result do
      {:ok, %Output{telemetry: telemetry} = output, %{async: async}} ->
        for {name, record} <- telemetry["regularizers"],
            do: regularizer(name, record, system_time, %{pool: pool, async: name in async})

        measurements = %{
          duration: System.monotonic_time() - start,
          loss_total: output.loss_total,
          regularizer_total: telemetry["regularizer_total"]
        }

        execute([:tinkex, :custom_loss, :stop], measurements, metadata)

      {:error, reason} ->
        failed(reason, start, metadata)
    end

    result
  end

  defp failed(reason, start, metadata) do
    execute(
      [:tinkex, :custom_loss, :exception],
      %{duration: System.monotonic_time() - start},
      Map.put(metadata, :reason, reason)
    )
  end

  defp regularizer(name, record, system_time, metadata) do
    metadata = Map.merge(metadata, %{regularizer_name: name, weight: record["weight"]})
    event = &[:tinkex, :regularizer, :compute, &1]
    duration = native(record["seconds"])
    execute(event.(:start), %{system_time: system_time}, metadata)

    case record do
      # Handlers do arithmetic with these.
      %{"value" => value, "contribution" => contribution}
      when is_number(value) and is_number(contribution) ->
        execute(
          event.(:stop),
          %{
            duration: duration,
            value: value,
            contribution: contribution,
            grad_norm: record["grad_norm"]
          },
          metadata
        )

      %{"error" => error, "value" => value} ->
        reason = error || "its value is #{value}"
        execute(event.(:exception), %{duration: duration}, Map.put(metadata, :reason, reason))
    end
  end

  defp native(seconds) when is_float(seconds),
    do: System.convert_time_unit(round(seconds * 1.0e9), :nanosecond, :native)

  defp native(_unknown), do: 0

  @doc false
  def worker_up(config, worker, %{duration: duration} = up) do
    metadata = Map.merge(%{pool: config.name, worker: worker}, Map.delete(up, :duration))
    execute([:tinkex_custom_loss, :worker, :up], %{duration: duration}, metadata)
  end

  @doc false
  def worker_down(config, worker, reason, os_pid, delay) do
    metadata = %{pool: config.name, worker: worker, os_pid: os_pid, reason: reason}
    execute([:tinkex_custom_loss, :worker, :down], %{delay: delay}, metadata)
  end

  @doc false
  def queued(config, length),
    do: execute([:tinkex_custom_loss, :queue], %{length: length}, %{pool: config.name})

  @doc false
  def retry(config, reason),
    do: execute([:tinkex_custom_loss, :retry], %{count: 1}, %{pool: config.name, reason: reason})

  @doc false
  def deadline(config, stage, timeout) do
    execute([:tinkex_custom_loss, :deadline], %{timeout: timeout}, %{
      pool: config.name,
      stage: stage
    })
  end

  @doc false
  # function_exported?/3 does not load modules, and would say no for ever in a development system.
  def load, do: Code.ensure_loaded(:telemetry)

  defp execute(event, measurements, metadata) do
    if function_exported?(:telemetry, :execute, 3),
      do: apply(:telemetry, :execute, [event, measurements, metadata])

    :ok
  end
end
