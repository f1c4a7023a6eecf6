defmodule Tinkex.CustomLoss.Pool.Memory do
  @moduledoc false
  # What a worker shares with its Python beside the pipe: files of Python's that live in memory and
  # never have a name, opened through /proc. A large payload lies in one of them, from when its request
  # is given to the worker until that is answered, and so does the payload of the answer.
  #
  # A raw file is its opener's alone. The outbox's writer has its own descriptors, to write requests
  # while the worker goes on; the worker's are for answers.

  alias Tinkex.CustomLoss.Wire.Frame

  # Of fewer bytes the pipe is as quick.
  @least 131_072

  # `files`: index => descriptor, `taken`: id => index, `written` and `used`: index => the bytes that a
  # file may have, and those of its largest request since `trim/1`.
  defstruct files: %{}, free: [], taken: %{}, written: %{}, used: %{}

  @type t :: %__MODULE__{}
  @type file :: :file.fd()

  @doc "How many files a worker shall offer. Requests beyond them take the pipe."
  def files(%{shared_memory: false}), do: 0
  def files(%{max_in_flight: requests}), do: min(requests, 8)

  @doc "Nothing is shared."
  def none, do: %__MODULE__{}

  @doc "The files of a worker that is ready, open in the calling process; or why they are not."
  @spec open(map()) :: {:ok, t()} | {:error, String.t()}
  def open(%{shared_memory: %{descriptors: descriptors, token: token}, pid: pid}) do
    opened = for descriptor <- descriptors, do: open("/proc/#{pid}/fd/#{descriptor}", token)
    files = for {{:ok, file}, index} <- Enum.with_index(opened), into: %{}, do: {index, file}
    memory = %__MODULE__{files: files, free: Map.keys(files)}

    with {:error, why} <- Enum.find(opened, {:ok, memory}, &match?({:error, _why}, &1)) do
      close(memory)
      {:error, why}
    end
  end

  def open(_ready) do
    {:error,
     "its Python has none to offer, which takes memfd_create(2), of Linux, descriptors to spare, " <>
       "and no limit on the size of files (ulimit -f)"}
  end

  # It is another process's where the worker counts its processes differently.
  defp open(path, token) do
    with {:ok, file} <- :file.open(path, [:raw, :binary, :read, :write]),
         {:read, _file, {:ok, ^token}} <- {:read, file, :file.pread(file, 0, byte_size(token))} do
      {:ok, file}
    else
      {:error, reason} ->
        {:error, "#{path} cannot be opened: #{reason}"}

      {:read, file, _other} ->
        :file.close(file)
        {:error, "#{path} is not the worker's"}
    end
  end

  def close(%{files: files}), do: Enum.each(files, fn {_index, file} -> :file.close(file) end)

  @doc "The frame of the request `id` for the writer: `{:shared, index, frame}` if it has a file now."
  def place(%{free: [index | free]} = memory, id, frame) do
    case Frame.payload_size(frame) do
      size when size >= @least ->
        used = Map.update(memory.used, index, size, &max(&1, size))
        written = Map.update(memory.written, index, size, &max(&1, size))
        taken = Map.put(memory.taken, id, index)
        memory = %{memory | free: free, taken: taken, written: written, used: used}
        {{:shared, index, frame}, memory}

      _small ->
        {frame, memory}
    end
  end

  def place(memory, _id, frame), do: {frame, memory}

  @doc "Whether the request `id` has a file."
  def has?(memory, id), do: is_map_key(memory.taken, id)

  @doc "The request `id` is over. The lowest file is the next one taken, so that others stay unused."
  def release(memory, id) do
    case Map.pop(memory.taken, id) do
      {nil, _taken} -> memory
      {index, taken} -> %{memory | taken: taken, free: Enum.sort([index | memory.free])}
    end
  end

  @doc "Writes the payload of a placed frame; what is left to send."
  @spec write(%{non_neg_integer() => file()}, term()) :: iodata()
  def write(files, {:shared, index, frame}) when is_map_key(files, index) do
    {payload, message} = Frame.apart(frame)

    case :file.pwrite(files[index], 0, payload) do
      :ok -> [Frame.encode_place({index, 0, Frame.payload_size(frame)}) | message]
      # No memory is left, say; the pipe needs none.
      {:error, _reason} -> frame
    end
  end

  def write(_files, {:shared, _not_opened, frame}), do: frame
  def write(_files, frame), do: frame

  @doc "The payload that the answer to `id` is said to have."
  @spec read(t(), term(), Frame.place()) :: {:ok, binary()} | {:error, String.t()}
  def read(%{files: files, taken: taken}, id, {index, at, size}) do
    case taken do
      %{^id => ^index} -> read_file(files[index], at, size)
      _other -> {:error, "is said to be in the shared file #{index}, which #{id} does not have"}
    end
  end

  # No length claims memory that no bytes fill.
  defp read_file(file, at, size) do
    case :file.position(file, :eof) do
      {:ok, there} when at + size <= there ->
        with {:ok, payload} when byte_size(payload) == size <- :file.pread(file, at, size),
             do: {:ok, payload},
             else: (_gone -> {:error, "is in a shared file, which cannot be read"})

      {:ok, there} ->
        {:error, "is said to be the #{size} bytes from #{at} on of a shared file of #{there}"}
    end
  end

  @doc "Lets go of the memory that free files have, but for what their requests used lately."
  def trim(%{files: files, free: free} = memory) do
    written =
      for {index, written} <- memory.written, into: %{} do
        if index in free and 4 * Map.get(memory.used, index, 0) < written do
          {:ok, 0} = :file.position(files[index], 0)
          :ok = :file.truncate(files[index])
          {index, 0}
        else
          {index, written}
        end
      end

    %{memory | written: written, used: %{}}
  end
end
