defmodule Tinkex.CustomLoss.Pool.Slot do
  @moduledoc false
  # What the pool knows of one worker:
  #
  #     down ──▶ starting ──▶ ready ──▶ down
  #
  # and, if it is to be started anew, how far that is:
  #
  #     nil ──▶ :closed ──no requests left──▶ :ending ──down──▶ :starting ──ready──▶ nil
  #
  # `load` counts its requests. One that is tried again with no other is `alone`: either :open, while
  # nobody joins it, or :closed to all others.

  defstruct state: :down,
            reason: nil,
            since: nil,
            load: 0,
            alone: nil,
            port: nil,
            os_pid: nil,
            ready: nil,
            rss: nil,
            worker: nil,
            starts: 0,
            failed: false,
            renewal: nil

  def new, do: %__MODULE__{since: now()}

  def starting(slot, os_pid), do: %{slot | state: :starting, os_pid: os_pid, since: now()}

  def ready(slot, port, ready) do
    up = %{slot | state: :ready, port: port, ready: ready, starts: slot.starts + 1, since: now()}
    %{up | failed: false}
  end

  @doc "Without a Python process, and why; the rest outlives those."
  def down(slot, reason) do
    kept = Map.take(slot, [:worker, :starts, :renewal])
    Map.merge(%{new() | reason: reason, failed: slot.state != :ready}, kept)
  end

  @doc "Whether it will be idle: it is being started, which has not failed, or nobody joins what it has."
  def coming?(slot), do: (slot.state != :ready and not slot.failed) or slot.alone == :closed

  @doc """
  Whether it may be given a request, of less than `limit`.

  What a worker that was killed is given would be lost, and be suspected of it.
  """
  def open?(slot, limit) do
    slot.state == :ready and slot.load < limit and slot.alone != :closed and slot.renewal == nil and
      Process.alive?(slot.worker)
  end

  @doc """
  With one more request, that was lost on the workers of `losses` before.

  Nobody joins what may have ended several workers, or what came back to its own, since others serve.
  """
  def take(slot, index, losses) do
    alone =
      case losses do
        _any when slot.load > 0 -> nil
        [] -> nil
        [{other, _reason}] when other != index -> :open
        _several_or_here -> :closed
      end

    %{slot | load: slot.load + 1, alone: alone}
  end

  def release(slot), do: %{slot | load: slot.load - 1, alone: nil}

  @doc "As in `Tinkex.CustomLoss.info/1`."
  def describe(slot, index) do
    %{
      index: index,
      state: slot.state,
      os_pid: slot.os_pid,
      in_flight: slot.load,
      restarts: max(0, slot.starts - 1),
      since_ms: now() - slot.since,
      reason: slot.reason,
      versions: slot.ready && Map.take(slot.ready, [:package, :python, :torch, :tinker]),
      rss: slot.rss
    }
  end

  defp now, do: System.monotonic_time(:millisecond)
end
