defmodule Tinkex.CustomLoss.Pool.Log do
  @moduledoc false
  # Python's log records, and the ends of workers, in Elixir's Logger.

  alias Tinkex.CustomLoss.WorkerError

  require Logger

  # A term can log faster than Logger takes it, and what Python wrote is in this process's mailbox
  # already. Beyond this many waiting messages records are counted instead, so that answers get by.
  @backlog 1_000

  @doc "The state of one worker's log."
  def new(pool, worker), do: %{pool: pool, worker: worker, dropped: 0}

  @doc "Logs a record of `Protocol.decode/1`; called by the worker that received it."
  def write(log, record) do
    case Process.info(self(), :message_queue_len) do
      {_, waiting} when waiting > @backlog ->
        %{log | dropped: log.dropped + 1}

      _ ->
        log = report_dropped(log)
        metadata = [python_logger: record.logger, term: record.term] ++ metadata(log)
        Logger.bare_log(record.level, record.message, metadata)
        log
    end
  end

  defp report_dropped(%{dropped: 0} = log), do: log

  defp report_dropped(%{dropped: dropped} = log) do
    Logger.warning(
      "#{dropped} log records of Python were left out: they came faster than Logger takes them",
      metadata(log)
    )

    %{log | dropped: 0}
  end

  defp metadata(log), do: [pool: log.pool, worker: log.worker]

  @doc "A worker ended, or did not start."
  def worker_down(pool, index, reason, os_pid, delay) do
    process = if os_pid, do: " (OS process #{os_pid})", else: ""
    sentence = Exception.message(%WorkerError{reason: reason})

    Logger.log(
      if(WorkerError.planned?(reason), do: :info, else: :error),
      "worker #{index} of Tinkex.CustomLoss #{inspect(pool)}#{process} ended: #{sentence}. " <>
        "The next one is started in #{delay} ms",
      pool: pool,
      worker: index
    )
  end

  @doc "A message that is nothing to the process that got it."
  def stray(module, pool, message) do
    Logger.debug("#{inspect(module)} of #{inspect(pool)} ignores #{inspect(message, limit: 20)}",
      pool: pool
    )
  end
end
