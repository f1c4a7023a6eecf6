defmodule Tinkex.CustomLoss.EventLogger do
  @moduledoc false
  # Telemetry events in words. One that cannot be put in words may not raise: telemetry detaches a
  # handler that does.

  require Logger

  def handle_event(event, measurements, metadata, %{level: level}) do
    case sentence(event, measurements, metadata) do
      nil -> :ok
      {:trouble, text} -> Logger.warning(text)
      text -> Logger.log(level, text)
    end
  end

  defp sentence([:tinkex, :custom_loss, :stop], measurements, metadata) do
    "custom loss #{number(measurements.loss_total)}, of which #{metadata.regularizer_count} " <>
      "regularizers contribute #{number(measurements.regularizer_total)}, " <>
      "in #{ms(measurements.duration)}"
  end

  defp sentence([:tinkex, :custom_loss, :exception], measurements, metadata) do
    {:trouble,
     "custom loss failed after #{ms(measurements.duration)}: #{reason(metadata.reason)}"}
  end

  defp sentence([:tinkex, :regularizer, :compute, :stop], measurements, metadata) do
    "regularizer #{inspect(metadata.regularizer_name)}: value #{number(measurements.value)}, " <>
      "weight #{number(metadata.weight)}, contribution #{number(measurements.contribution)}, " <>
      "gradient norm #{number(measurements.grad_norm)}, in #{ms(measurements.duration)}"
  end

  defp sentence([:tinkex, :regularizer, :compute, :exception], _measurements, metadata) do
    {:trouble,
     "regularizer #{inspect(metadata.regularizer_name)} was left out: #{reason(metadata.reason)}"}
  end

  defp sentence([:tinkex_custom_loss, :worker, :up], measurements, metadata) do
    "custom loss worker #{metadata.worker} is ready after #{ms(measurements.duration)}, " <>
      "OS process #{metadata.os_pid}"
  end

  defp sentence([:tinkex_custom_loss, :worker, :down], measurements, metadata) do
    {:trouble,
     "custom loss worker #{metadata.worker} ended: #{reason(metadata.reason)}; " <>
       "the next one starts in #{measurements.delay} ms"}
  end

  defp sentence([:tinkex_custom_loss, :retry], _measurements, metadata),
    do: {:trouble, "a custom loss is computed once more: #{reason(metadata.reason)}"}

  defp sentence([:tinkex_custom_loss, :deadline], measurements, metadata),
    do:
      {:trouble,
       "a custom loss was not there after #{measurements.timeout} ms, #{metadata.stage}"}

  # Starts say nothing that their ends do not.
  defp sentence(_event, _measurements, _metadata), do: nil

  defp number(value) when is_float(value), do: :io_lib.format("~.5g", [value]) |> to_string()
  defp number(value), do: inspect(value)

  defp ms(duration),
    do: "#{System.convert_time_unit(duration, :native, :microsecond) / 1000} ms"

  defp reason(sentence) when is_binary(sentence), do: sentence
  defp reason(%{__exception__: true} = error), do: Exception.message(error)

  defp reason(reason),
    do: Exception.message(%Tinkex.CustomLoss.WorkerError{reason: reason})
end
