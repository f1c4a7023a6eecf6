defmodule Tinkex.CustomLoss.Pool.Outbox do
  @moduledoc false
  # What a worker is still to be sent, in order, and the process that writes it.
  #
  #     waiting ──offered──▶ with the writer ──▶ in the pipe
  #        ▲                      │
  #        └───── pipe full ──────┘
  #
  # A frame waits here until the pipe takes it, and until then it can be withdrawn as if it had never
  # been. Whoever writes to a full pipe is suspended, so that is left to a process of its own, and to
  # a frame that nobody would withdraw: a ping. A large frame is the writer's, too, for the emulator
  # copies it, and so is what goes into shared memory.

  alias Tinkex.CustomLoss.Pool.Memory
  alias Tinkex.CustomLoss.Wire.Protocol

  defstruct [:writer, waiting: :queue.new(), offered: nil]

  # The id of the pings that wait for a pipe.
  @probe 0

  @doc "The outbox of a port; its writer is linked to the calling process, and tells it what it did."
  def open(port) do
    owner = self()
    %__MODULE__{writer: spawn_link(fn -> write(port, owner, %{}) end)}
  end

  @doc """
  Frames may be placed in the files of a worker that is ready from now on, see `Memory.place/3`.

  Where the writer cannot open them, they take the pipe: descriptors run out, and workers end.
  """
  def share(outbox, ready) do
    send(outbox.writer, {:share, ready})
    outbox
  end

  @doc "Nothing more is written. What was begun is in the hands of the emulator."
  def close(outbox) do
    Process.unlink(outbox.writer)
    Process.exit(outbox.writer, :kill)
  end

  @doc "The id that the answer to a ping of the writer has."
  def probe, do: @probe

  @doc "Sends the frame of the request `id` after all others."
  def put(outbox, id, frame), do: offer(update_in(outbox.waiting, &:queue.in({id, frame}, &1)))

  @doc "Sends a frame that is small, and about nothing that waits, before all others."
  def put_first(outbox, frame),
    do: offer(update_in(outbox.waiting, &:queue.in_r({nil, frame}, &1)))

  @doc "Takes back the request `id`, unless it was begun."
  @spec withdraw(%__MODULE__{}, integer()) :: {:ok, %__MODULE__{}} | :begun
  def withdraw(outbox, id) do
    if begun?(outbox, id),
      do: :begun,
      else: {:ok, update_in(outbox.waiting, &:queue.filter(fn {other, _} -> other != id end, &1))}
  end

  @doc "Whether a part of the frame of `id` may have been sent."
  def begun?(outbox, id),
    do: not :queue.any(fn {other, _frame} -> other == id end, outbox.waiting)

  @doc "The writer says `:written`: it wants the next one."
  def written(outbox), do: offer(%{outbox | offered: nil})

  @doc "The writer says `:full`, and will say `:written` when it is not. What it was given waits on."
  def full(%{offered: {id, _frame} = offered} = outbox),
    do: {id, %{outbox | waiting: :queue.in_r(offered, outbox.waiting), offered: :pipe}}

  defp offer(%{offered: nil} = outbox) do
    case :queue.out(outbox.waiting) do
      {{:value, {_id, frame} = offered}, waiting} ->
        send(outbox.writer, {:write, frame})
        %{outbox | waiting: waiting, offered: offered}

      {:empty, _waiting} ->
        outbox
    end
  end

  defp offer(outbox), do: outbox

  defp write(port, owner, files) do
    receive do
      {:share, ready} ->
        case Memory.open(ready) do
          {:ok, memory} -> write(port, owner, memory.files)
          {:error, _why} -> write(port, owner, files)
        end

      {:write, frame} ->
        frame = Memory.write(files, frame)

        unless command(port, frame, [:nosuspend]) do
          send(owner, {self(), :full})
          command(port, Protocol.encode_ping(@probe), [])
        end

        send(owner, {self(), :written})

      _stray ->
        :ok
    end

    # It may be the last one for a while, and large.
    :erlang.garbage_collect()
    write(port, owner, files)
  end

  # A closed port is no news: its owner hears of it.
  defp command(port, frame, options) do
    Port.command(port, frame, options)
  rescue
    ArgumentError -> true
  end
end
