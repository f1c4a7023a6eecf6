defmodule Tinkex.CustomLoss.Pool.Slots do
  @moduledoc false
  # What the pool knows of its workers, each of which is
  #
  #     down ──▶ starting ──▶ ready ──▶ down
  #
  # which of them is given a request, and which is started anew. One at a time is: the first of
  # `renewals`, which is given no more requests. `stage` says how far that is:
  #
  #     closed ──no requests left──▶ ending ──down──▶ starting ──ready──▶ the next one's turn
  #        ▲                           │                 │
  #        └──────down by itself───────┘                 └──down──▶ nobody's: `failure` says why

  # `all`: index => slot, `renewals`: [{index, why}]
  defstruct [:limit, :max_rss, :failure, all: %{}, renewals: [], stage: :closed]

  # `load` counts the requests. One that is tried again with no other is `alone`: either :open, while
  # nobody joins it, or :closed to all others.
  @slot %{
    state: :down,
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
    failed: false
  }

  def new(config) do
    all = Map.new(1..config.workers, &{&1, %{@slot | since: now()}})
    %__MODULE__{all: all, limit: config.max_in_flight, max_rss: config.max_rss}
  end

  def get(slots, index), do: Map.fetch!(slots.all, index)

  @doc "The index of a worker's Erlang process."
  def find(slots, worker),
    do: Enum.find_value(slots.all, fn {index, slot} -> slot.worker == worker && index end)

  def os_pids(slots), do: for({_, %{os_pid: os_pid}} when os_pid != nil <- slots.all, do: os_pid)

  # For a request

  @doc "The least loaded worker with room."
  def roomiest(slots) do
    for({index, slot} <- open(slots, slots.limit), do: {slot.alone != nil, slot.load, index})
    |> Enum.min(fn -> {nil, nil, nil} end)
    |> elem(2)
  end

  @doc "For what is tried again: an idle worker, or one with room where none will be idle."
  def for_retry(slots) do
    case open(slots, 1) do
      [{index, _idle} | _] -> index
      [] -> if stranded?(slots), do: roomiest(slots)
    end
  end

  # What a worker that was killed is given would be lost, and be suspected of it.
  defp open(slots, limit) do
    for {index, %{state: :ready} = slot} <- slots.all,
        slot.load < limit and slot.alone != :closed and not renewed?(slots, index),
        Process.alive?(slot.worker),
        do: {index, slot}
  end

  # A worker did not start again, and no other will be idle: by having started, or since nobody joins
  # what it has.
  defp stranded?(slots) do
    all = Map.values(slots.all)

    Enum.any?(all, & &1.failed) and
      Enum.all?(all, &((&1.state == :ready or &1.failed) and &1.alone != :closed))
  end

  @doc "Why no worker started, if that is so of every one, and waiting is no use."
  def hopeless(%{all: all}) do
    reasons = for {_, %{state: :down, reason: {:not_started, _} = reason}} <- all, do: reason
    if length(reasons) == map_size(all), do: hd(reasons)
  end

  @doc """
  With one more request, that was lost on the workers of `losses` before.

  Nobody joins what may have ended several workers, or what came back to its own, since others serve.
  """
  def take(slots, index, losses) do
    %{load: load} = get(slots, index)

    alone =
      case losses do
        _any when load > 0 -> nil
        [] -> nil
        [{other, _reason}] when other != index -> :open
        _several_or_here -> :closed
      end

    change(slots, index, load: load + 1, alone: alone)
  end

  def release(slots, index),
    do: change(slots, index, load: get(slots, index).load - 1, alone: nil)

  # News of a worker

  @doc "Its Erlang process is another one; or nil, if it ended."
  def put_worker(slots, index, worker), do: change(slots, index, worker: worker)

  def starting(slots, index, os_pid),
    do: change(slots, index, state: :starting, os_pid: os_pid, since: now())

  def ready(slots, index, port, ready) do
    starts = get(slots, index).starts + 1
    up = [state: :ready, port: port, ready: ready, starts: starts, since: now(), failed: false]
    slots = change(slots, index, up)

    if slots.stage == :starting and renewed?(slots, index),
      do: %{slots | renewals: tl(slots.renewals), stage: :closed},
      else: slots
  end

  def alive(slots, index, rss) do
    slots = change(slots, index, rss: rss)

    if rss > slots.max_rss and not List.keymember?(slots.renewals, index, 0),
      do: %{slots | renewals: slots.renewals ++ [{index, {:max_rss, rss}}]},
      else: slots
  end

  def down(slots, index, reason) do
    %{state: state, worker: worker, starts: starts} = get(slots, index)
    down = %{@slot | reason: reason, since: now(), failed: state != :ready}
    slots = put_in(slots.all[index], %{down | worker: worker, starts: starts})
    if renewed?(slots, index), do: renewal_down(slots, hd(slots.renewals), reason), else: slots
  end

  # Twice, if it had ended by itself when it was first told to.
  defp renewal_down(%{stage: stage} = slots, {_index, why}, why) when stage != :closed,
    do: %{slots | stage: :starting}

  # With what it would load now, no other should be ended for it.
  defp renewal_down(%{stage: :starting} = slots, _renewal, reason),
    do: %{slots | renewals: [], stage: :closed, failure: reason}

  defp renewal_down(slots, _renewal, _reason), do: %{slots | stage: :closed}

  # To start anew

  @doc "All shall be."
  def reload(slots) do
    # Of those that were to be, only the first one may have loaded what was edited since.
    begun = Enum.take(slots.renewals, 1)
    all = for index <- Map.keys(slots.all), do: {index, :reloaded}
    %{slots | renewals: begun ++ all, failure: nil}
  end

  @doc """
  One step further: `{:restart, worker, why, slots}`, `:wait`, or `{:done, failure}`, where that is nil
  unless one did not start.
  """
  def renew(%{renewals: []} = slots), do: {:done, slots.failure}

  def renew(%{renewals: [{index, why} | _], stage: :closed} = slots) do
    case get(slots, index) do
      %{load: 0, worker: worker} when worker != nil ->
        {:restart, worker, why, %{slots | stage: :ending}}

      _in_time ->
        :wait
    end
  end

  def renew(_slots), do: :wait

  defp renewed?(slots, index), do: match?([{^index, _why} | _], slots.renewals)

  @doc "As in `Tinkex.CustomLoss.info/1`."
  def describe(slots) do
    for {index, slot} <- Enum.sort(slots.all) do
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
  end

  defp change(slots, index, fields),
    do: update_in(slots.all[index], &Map.merge(&1, Map.new(fields)))

  defp now, do: System.monotonic_time(:millisecond)
end
