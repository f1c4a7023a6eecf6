defmodule Tinkex.CustomLoss.Pool.Line do
  @moduledoc false
  # Who waits, in the order of their coming: `:waiting` for room at a worker, `:returned` for the same
  # after its worker ended, or `:retrying` on an idle one. The pool that holds the line is sent
  # `{{:gone, id}, ...}` and `{:timeout, _, {:deadline, id}}` about those in it, and withdraws them.

  alias Tinkex.CustomLoss.Pool

  # id => {place, request, monitor of its caller, timer}
  defstruct waiting: :queue.new(), returned: :queue.new(), retrying: :queue.new(), watched: %{}

  @doc "Puts a request at the end of a place."
  def join(line, place, %{id: id} = request) do
    monitor = :erlang.monitor(:process, request.caller, tag: {:gone, id})
    watched = Map.put(line.watched, id, {place, request, monitor, timer(request)})
    line = Map.update!(%{line | watched: watched}, place, &:queue.in(id, &1))
    Pool.tell(request.reply_to, {:queued, size(line)})
    line
  end

  defp timer(%{deadline: :infinity}), do: nil

  defp timer(%{deadline: deadline, id: id}),
    do: :erlang.start_timer(deadline, self(), {:deadline, id}, abs: true)

  @doc "Takes the first request of a place, if there is one."
  def take(line, place) do
    case :queue.peek(Map.fetch!(line, place)) do
      {:value, id} ->
        {request, line} = remove(line, id)
        Pool.tell(request.reply_to, :granted)
        {request, line}

      :empty ->
        nil
    end
  end

  @doc "Without the request `id`, which may have been taken by now."
  def withdraw(line, id) when is_map_key(line.watched, id), do: line |> remove(id) |> elem(1)
  def withdraw(line, _id), do: line

  @doc "All that wait, taken."
  def empty(line) do
    Enum.map_reduce(Map.keys(line.watched), line, fn id, line -> remove(line, id) end)
  end

  defp remove(line, id) do
    {{place, request, monitor, timer}, watched} = Map.pop!(line.watched, id)
    Process.demonitor(monitor, [:flush])
    if timer, do: :erlang.cancel_timer(timer)
    {request, Map.update!(%{line | watched: watched}, place, &:queue.delete(id, &1))}
  end

  @doc "How many wait."
  def size(line), do: map_size(line.watched)
  def size(line, place), do: line |> Map.fetch!(place) |> :queue.len()
end
