defmodule Tinkex.CustomLoss.EventLogger do
  @moduledoc false
  # Telemetry events in words. One that cannot be put in words may not raise: telemetry detaches a
  # handler that does.

  alias Tinkex.CustomLoss.{Output, WorkerError}

  require Logger

  def handle_event(event, measurements, metadata, %{level: level}) do
    case sentence(event, measurements, metadata) do
      nil -> :ok
      {:trouble, text} -> Logger.warning(text)
      text -> Logger.log(level, text)
    end
  end

  defp sentence([:tinkex_custom_loss, :compute, :stop], measurements, %{error: nil} = metadata) do
    "#{pool(metadata)}: loss #{number(Map.get(measurements, :loss_total, "not finite"))}, of which " <>
      "#{length(metadata.regularizers)} regularizers contribute " <>
      "#{number(Map.get(measurements, :regularizer_total, "not finite"))}, in #{ms(measurements.duration)}"
  end

  defp sentence([:tinkex_custom_loss, :compute, :stop], measurements, metadata),
    do: {:trouble, failed(measurements, metadata, reason(metadata.error))}

  defp sentence([:tinkex_custom_loss, :compute, :exception], measurements, metadata) do
    raised = Exception.format_banner(metadata.kind, metadata.reason)
    {:trouble, failed(measurements, metadata, raised)}
  end

  defp sentence([:tinkex, :regularizer, :compute, :stop], measurements, metadata) do
    "#{pool(metadata)}: regularizer #{inspect(metadata.regularizer_name)}: value #{number(measurements.value)}, " <>
      "weight #{number(metadata.weight)}, contribution #{number(measurements.contribution)}, " <>
      "gradient norm #{number(measurements.grad_norm)}, in #{ms(measurements.duration)}"
  end

  defp sentence([:tinkex, :regularizer, :compute, :exception], _measurements, metadata) do
    {:trouble,
     "#{pool(metadata)}: regularizer #{inspect(metadata.regularizer_name)} was left out: " <>
       reason(metadata.reason)}
  end

  defp sentence([:tinkex_custom_loss, :worker, :up], measurements, metadata) do
    "#{pool(metadata)}: worker #{metadata.worker} is ready after #{ms(measurements.duration)}, " <>
      "OS process #{metadata.os_pid}"
  end

  defp sentence([:tinkex_custom_loss, :worker, :down], measurements, metadata) do
    sentence =
      "#{pool(metadata)}: worker #{metadata.worker} ended: #{reason(metadata.reason)}; " <>
        "the next one starts in #{ms(measurements.delay)}"

    if WorkerError.planned?(metadata.reason), do: sentence, else: {:trouble, sentence}
  end

  defp sentence([:tinkex_custom_loss, :retry], _measurements, metadata),
    do: {:trouble, "#{pool(metadata)}: computing once more: #{reason(metadata.reason)}"}

  defp sentence([:tinkex_custom_loss, :deadline], measurements, metadata) do
    {:trouble, "#{pool(metadata)}: no loss after #{ms(measurements.timeout)}, #{metadata.stage}"}
  end

  # Starts say nothing that their ends do not, nor Tinkex's steps what ours do not.
  defp sentence(_event, _measurements, _metadata), do: nil

  defp failed(measurements, metadata, reason),
    do: "#{pool(metadata)}: no loss after #{ms(measurements.duration)}: #{reason}"

  defp pool(metadata), do: "Tinkex.CustomLoss #{inspect(metadata.pool)}"

  # Without a gradient there is no norm.
  defp number(nil), do: "none"
  defp number(value), do: Output.figure(value)

  defp ms(duration),
    do: "#{System.convert_time_unit(duration, :native, :microsecond) / 1000} ms"

  defp reason(sentence) when is_binary(sentence), do: sentence
  defp reason(%{__exception__: true} = error), do: Exception.message(error)

  defp reason(reason),
    do: Exception.message(%WorkerError{reason: reason})
end
