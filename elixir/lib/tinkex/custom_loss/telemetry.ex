defmodule Tinkex.CustomLoss.Telemetry do
  @moduledoc """
  Events for `:telemetry`, which are executed when that library is there and cost nothing when not.

  ## A computation

  A span as `:telemetry.span/3` makes it, from the call to what it returns:

  | event | measurements | metadata |
  |---|---|---|
  | `[:tinkex_custom_loss, :compute, :start]` | `system_time`, `monotonic_time` | `pool`, `step`, `gradients`, `regularizers` (their names) |
  | `[:tinkex_custom_loss, :compute, :stop]` | `duration`, `monotonic_time`, `loss_total`, `regularizer_total` | the same, and `error`, `record` |
  | `[:tinkex_custom_loss, :compute, :exception]` | `duration`, `monotonic_time` | the same, and `kind`, `reason`, `stacktrace` |

  `record` is that of the step (`Tinkex.CustomLoss.Output`), or nil with an error.
  `error` is the exception of an answer `{:error, exception}`, or nil. With an error there are no
  losses; nor is there one that is not finite. `:exception` is for what is raised.

  ## A pool

  | event | measurements | metadata |
  |---|---|---|
  | `[:tinkex_custom_loss, :worker, :up]` | `duration` of the start | `pool`, `worker`, `os_pid`, `versions` |
  | `[:tinkex_custom_loss, :worker, :down]` | `delay` until the next start | `pool`, `worker`, `os_pid`, `reason` |
  | `[:tinkex_custom_loss, :queue]` | `length`, this one included | `pool` |
  | `[:tinkex_custom_loss, :retry]` | `count`, 1 | `pool`, `reason` the worker ended for |
  | `[:tinkex_custom_loss, :deadline]` | `timeout` | `pool`, `stage` (`:queued`, `:computing`) |

  `reason` is as in `Tinkex.CustomLoss.WorkerError`, whose message puts it in words.

  ## Those of Tinkex

  A computation also has the events of Tinkex, with its names, measurements and metadata, so that
  `Tinkex.Regularizer.Telemetry.attach_logger/1` and existing dashboards work as they are. There,
  `:exception` is how a step or a regularizer fails, whether anything was raised or not.

  | event | measurements | metadata |
  |---|---|---|
  | `[:tinkex, :custom_loss, :start]` | `system_time`, `monotonic_time` | `regularizer_count`, `track_grad_norms` |
  | `[:tinkex, :custom_loss, :stop]` | `duration`, `monotonic_time`, `loss_total`, `regularizer_total` | `regularizer_count` |
  | `[:tinkex, :custom_loss, :exception]` | `duration`, `monotonic_time` | `regularizer_count`, `reason` (an exception, or a sentence for a loss that is not finite) |
  | `[:tinkex, :regularizer, :compute, :stop]` | `duration`, `value`, `contribution`, `grad_norm` | `regularizer_name`, `weight`, `async` |
  | `[:tinkex, :regularizer, :compute, :exception]` | `duration` | `regularizer_name`, `weight`, `async`, `reason` (a sentence) |

  Those of the regularizers come when the step is computed, with the `duration` that Python measured;
  when each one started nobody here knew, so there is no event for it. The last one is for a
  regularizer that was left out, or whose value is not finite.

  ## All of them

  `pool` is the name that the pool was started with, whichever way it was called, or the pid of one
  that has none; the metadata of a computation's events, Tinkex's too, also have
  `telemetry_span_context`, by which they belong together. All times - `duration`, `delay`, `timeout`,
  `system_time`, `monotonic_time` - are in native units: see `System.convert_time_unit/3`. A
  `grad_norm` is with respect to logprobs.

  To see them in the log, call `attach_logger/1`.
  """

  alias Tinkex.CustomLoss.{EventLogger, Output, Schema}

  @events [
    [:tinkex_custom_loss, :compute, :start],
    [:tinkex_custom_loss, :compute, :stop],
    [:tinkex_custom_loss, :compute, :exception],
    [:tinkex, :custom_loss, :start],
    [:tinkex, :custom_loss, :stop],
    [:tinkex, :custom_loss, :exception],
    [:tinkex, :regularizer, :compute, :stop],
    [:tinkex, :regularizer, :compute, :exception],
    [:tinkex_custom_loss, :worker, :up],
    [:tinkex_custom_loss, :worker, :down],
    [:tinkex_custom_loss, :queue],
    [:tinkex_custom_loss, :retry],
    [:tinkex_custom_loss, :deadline]
  ]

  @levels [:debug, :info, :notice, :warning, :error, :critical, :alert, :emergency]

  @logger [
    handler_id: [type: :any, doc: "to `detach/1` with. By default one is made."],
    level: [
      type: {:in, @levels},
      default: :info,
      doc: "of steps and regularizers. What went wrong is logged as `:warning`."
    ]
  ]

  @doc "All events, for `:telemetry.attach_many/4`."
  @spec events() :: [[atom()]]
  def events, do: @events

  @doc """
  Logs what happens: a line a step, a line a regularizer, and the pool's troubles.

  #{Schema.docs(@logger)}
  Returns the handler's id. Raises `ArgumentError` if the library `:telemetry` is not there.
  """
  @spec attach_logger(keyword()) :: term()
  def attach_logger(opts \\ []) do
    options = Schema.validate!(opts, @logger, "attach_logger/1")
    id = options.handler_id || {EventLogger, make_ref()}

    case attach(id, @events, &EventLogger.handle_event/4, Map.take(options, [:level])) do
      :ok -> id
      {:error, :already_exists} -> raise ArgumentError, "#{inspect(id)} is attached already"
    end
  end

  @doc false
  def available! do
    unless match?({:module, _}, load()) do
      raise ArgumentError, "there is no :telemetry to attach to: add it to your dependencies"
    end
  end

  @doc false
  def attach(id, events, handler, config) do
    available!()
    apply(:telemetry, :attach_many, [id, events, handler, config])
  end

  @metrics [pool: [type: :any, doc: "the name of one pool, to measure no other."]]

  @doc """
  Metrics for a reporter of `Telemetry.Metrics`: loss, terms, times, and a pool's troubles.

      children = [{TelemetryMetricsPrometheus, metrics: Tinkex.CustomLoss.Telemetry.metrics()}]

  Tags are `:pool` and, for those of a term, `:regularizer_name`. Times are in milliseconds.

  #{Schema.docs(@metrics)}
  Raises `ArgumentError` if the library `:telemetry_metrics` is not there.
  """
  @spec metrics(keyword()) :: [struct()]
  def metrics(opts \\ []) do
    options = Schema.validate!(opts, @metrics, "metrics/1")

    unless Code.ensure_loaded?(Telemetry.Metrics) do
      raise ArgumentError,
            "there is no Telemetry.Metrics: add :telemetry_metrics to your dependencies"
    end

    keep = if options.pool, do: [keep: &(&1.pool == options.pool)], else: []
    common = [tag_values: &%{&1 | pool: tag(&1.pool)}] ++ keep
    pool = [tags: [:pool]] ++ common
    term = [tags: [:pool, :regularizer_name]] ++ common
    time = [unit: {:native, :millisecond}]

    for {kind, name, opts} <- [
          {:last_value, "tinkex_custom_loss.compute.stop.loss_total", pool},
          {:last_value, "tinkex_custom_loss.compute.stop.regularizer_total", pool},
          {:summary, "tinkex_custom_loss.compute.stop.duration", time ++ pool},
          {:last_value, "tinkex.regularizer.compute.stop.value", term},
          {:last_value, "tinkex.regularizer.compute.stop.contribution", term},
          {:last_value, "tinkex.regularizer.compute.stop.grad_norm", term},
          {:summary, "tinkex.regularizer.compute.stop.duration", time ++ term},
          {:counter, "tinkex.regularizer.compute.exception.duration", term},
          {:summary, "tinkex_custom_loss.worker.up.duration", time ++ pool},
          {:counter, "tinkex_custom_loss.worker.down.delay", pool},
          {:summary, "tinkex_custom_loss.queue.length", pool},
          {:sum, "tinkex_custom_loss.retry.count", pool},
          {:counter, "tinkex_custom_loss.deadline.timeout", pool}
        ],
        do: apply(Telemetry.Metrics, kind, [name, opts])
  end

  # Reporters write tags as text.
  defp tag(name) when is_atom(name) or is_binary(name), do: name
  defp tag(other), do: inspect(other)

  @doc "Ends what `attach_logger/1` began."
  @spec detach(term()) :: :ok | {:error, :not_found}
  def detach(id), do: apply(:telemetry, :detach, [id])

  @doc false
  # Runs a computation, {:ok, output, result of Call.run/3} or {:error, exception}, between events.
  def span(pool, request, fun) do
    start = System.monotonic_time()
    context = %{pool: pool, telemetry_span_context: make_ref()}
    ours = Map.merge(context, Map.take(request, [:step, :gradients]))
    ours = Map.put(ours, :regularizers, Enum.map(request.regularizers, & &1.name))
    theirs = Map.put(context, :regularizer_count, length(request.regularizers))

    begun = %{system_time: System.system_time(), monotonic_time: start}
    execute([:tinkex_custom_loss, :compute, :start], begun, ours)
    tracked = Map.put(theirs, :track_grad_norms, request.gradients)
    execute([:tinkex, :custom_loss, :start], begun, tracked)

    try do
      fun.()
    catch
      kind, reason ->
        trace = __STACKTRACE__
        ended = ended(start)
        raised = %{kind: kind, reason: reason, stacktrace: trace}
        execute([:tinkex_custom_loss, :compute, :exception], ended, Map.merge(ours, raised))
        failed(ended, theirs, Exception.normalize(kind, reason, trace))
        :erlang.raise(kind, reason, trace)
    else
      {:ok, output, %{async: async}} = result ->
        # In the order of the call; one that is not enabled has no record.
        for %{name: name} <- request.regularizers,
            record = output.record["regularizers"][name],
            do: regularizer(name, record, Map.put(context, :async, name in async))

        computed(output, ended(start), ours, theirs)
        result

      {:error, error} = result ->
        ended = ended(start)
        told(ended, ours, error, nil)
        failed(ended, theirs, error)
        result
    end
  end

  defp ended(start) do
    now = System.monotonic_time()
    %{duration: now - start, monotonic_time: now}
  end

  # Handlers do arithmetic with measurements: what is no number is none.
  defp computed(%Output{loss_total: loss, record: record}, ended, ours, theirs) do
    losses = %{loss_total: loss, regularizer_total: record["regularizer_total"]}
    losses = for {name, value} <- losses, is_number(value), into: %{}, do: {name, value}
    ended = Map.merge(ended, losses)
    told(ended, ours, nil, record)

    if map_size(losses) == 2,
      do: execute([:tinkex, :custom_loss, :stop], ended, theirs),
      else: failed(ended, theirs, "its loss is #{loss}")
  end

  defp told(ended, ours, error, record) do
    metadata = Map.merge(ours, %{error: error, record: record})
    execute([:tinkex_custom_loss, :compute, :stop], ended, metadata)
  end

  defp failed(ended, theirs, reason),
    do: execute([:tinkex, :custom_loss, :exception], ended, Map.put(theirs, :reason, reason))

  defp regularizer(name, record, context) do
    metadata = Map.merge(context, %{regularizer_name: name, weight: record["weight"]})
    duration = native(record["seconds"])

    case record do
      %{"value" => value, "contribution" => contribution}
      when is_number(value) and is_number(contribution) ->
        execute(
          [:tinkex, :regularizer, :compute, :stop],
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

        execute(
          [:tinkex, :regularizer, :compute, :exception],
          %{duration: duration},
          Map.put(metadata, :reason, reason)
        )
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
    execute([:tinkex_custom_loss, :worker, :down], %{delay: from_ms(delay)}, metadata)
  end

  @doc false
  def queued(config, length),
    do: execute([:tinkex_custom_loss, :queue], %{length: length}, %{pool: config.name})

  @doc false
  def retry(config, reason),
    do: execute([:tinkex_custom_loss, :retry], %{count: 1}, %{pool: config.name, reason: reason})

  @doc false
  def deadline(config, stage, timeout) do
    metadata = %{pool: config.name, stage: stage}
    execute([:tinkex_custom_loss, :deadline], %{timeout: from_ms(timeout)}, metadata)
  end

  defp from_ms(ms), do: System.convert_time_unit(ms, :millisecond, :native)

  @doc false
  # function_exported?/3 does not load modules, and would say no for ever in a development system.
  def load, do: Code.ensure_loaded(:telemetry)

  defp execute(event, measurements, metadata) do
    if function_exported?(:telemetry, :execute, 3),
      do: apply(:telemetry, :execute, [event, measurements, metadata])

    :ok
  end
end
