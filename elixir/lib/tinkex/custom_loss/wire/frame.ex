defmodule Tinkex.CustomLoss.Wire.Frame do
  @moduledoc """
  A frame of docs/protocol.md: a message, which is a map, and before it the bytes of its tensors.

  Both are MessagePack, the tensors as one bin, the *payload*, and a batch in the message says where
  in it its bytes lie. So the message is small for whoever reads it, and the tensors are referred to
  and not copied, in both directions.

  In place of the payload there may be an ext, the *place* of a payload in shared memory:
  `{file, at, size}`.
  """

  alias Tinkex.CustomLoss.Wire.{Batch, MessagePack}

  # Where a message has batches: anywhere under these keys of one that we send, and right under
  # these keys of one that we get.
  @sent ["logprobs", "data", "prompt"]
  @received ["gradients", "logprobs", "parameters", "tokens", "prompt_logprobs"]

  # Each batch begins at a multiple of the largest size of a value.
  @alignment 8

  @doc "The frame of a message, in which every `Batch` becomes a batch of the wire."
  @spec encode(map()) :: iodata()
  def encode(message) do
    {placed, {size, pieces}} = message |> Map.take(@sent) |> place({0, []})
    message = message |> Map.merge(placed) |> MessagePack.encode()
    if size == 0, do: message, else: [<<0xC6, size::32>>, Enum.reverse(pieces) | message]
  end

  defp place(%Batch{} = batch, {size, pieces}) do
    padding = Integer.mod(-size, @alignment)
    bytes = IO.iodata_length(batch.data)
    wire = Batch.to_wire(batch, size + padding, bytes)
    {wire, {size + padding + bytes, [batch.data, <<0::size(padding)-unit(8)>> | pieces]}}
  end

  defp place(map, payload) when is_map(map) and not is_struct(map) do
    {entries, payload} =
      Enum.map_reduce(map, payload, fn {key, value}, payload ->
        {value, payload} = place(value, payload)
        {{key, value}, payload}
      end)

    {Map.new(entries), payload}
  end

  defp place(list, payload) when is_list(list), do: Enum.map_reduce(list, payload, &place/2)
  defp place(other, payload), do: {other, payload}

  # Larger tensors are left as they are, since a copy of them all would be another payload. A piece
  # of more than @joined would be one of those binaries for which the emulator asks the system for
  # fresh memory each time.
  @small 16_384
  @joined 262_144

  @doc "What was encoded in as few pieces as there are large tensors: many small ones are joined."
  @spec to_pieces(iodata()) :: [binary()]
  def to_pieces(iodata), do: iodata |> :erlang.iolist_to_iovec() |> join()

  defp join([piece | rest]) when byte_size(piece) < @small,
    do: join(rest, [piece], byte_size(piece))

  defp join([piece | rest]), do: [piece | join(rest)]
  defp join([]), do: []

  defp join([piece | rest], joined, size)
       when byte_size(piece) < @small and byte_size(piece) + size <= @joined,
       do: join(rest, [piece | joined], byte_size(piece) + size)

  defp join(rest, [alone], _size), do: [alone | join(rest)]

  defp join(rest, joined, _size),
    do: [joined |> Enum.reverse() |> IO.iodata_to_binary() | join(rest)]

  @type place :: {file :: non_neg_integer(), at :: non_neg_integer(), size :: non_neg_integer()}

  @doc "The size of the payload of a frame that was encoded, in binaries; 0 if it has none."
  @spec payload_size([binary()]) :: non_neg_integer()
  def payload_size([<<0xC6, size::32, _payload::binary>> | _rest]), do: size
  def payload_size(_frame), do: 0

  @doc "The payload of such a frame, and the rest."
  @spec apart([binary()]) :: {[binary()], [binary()]}
  def apart([<<0xC6, size::32, rest::binary>> | frame]), do: split([rest | frame], size)

  defp split([binary | rest], size) when byte_size(binary) <= size do
    {payload, message} = split(rest, size - byte_size(binary))
    {[binary | payload], message}
  end

  defp split([binary | rest], size) do
    <<payload::binary-size(size), message::binary>> = binary
    {[payload], [message | rest]}
  end

  @doc "What stands in place of a payload that lies elsewhere."
  @spec encode_place(place()) :: binary()
  def encode_place({file, at, size}), do: <<0xC7, 20, 1, file::32, at::64, size::64>>

  @doc """
  The message of a frame; the `data` of its batches are parts of the frame.

  `read` gets the payload that the message with this id says is elsewhere, or says why it cannot.
  """
  @spec decode(binary(), (term(), place() -> {:ok, binary()} | {:error, String.t()})) ::
          {:ok, term()} | {:error, Exception.t()}
  def decode(frame, read \\ &nowhere/2)

  def decode(<<0xC6, size::32, payload::binary-size(size), message::binary>>, _read) do
    with {:ok, %{} = message} <- MessagePack.decode(message), do: {:ok, open(message, payload)}
  end

  def decode(<<0xC7, 20, 1, file::32, at::64, size::64, message::binary>>, read) do
    with {:ok, %{} = message} <- MessagePack.decode(message) do
      # An ext is a map, too, but has no such key.
      case read.(Map.get(message, "id"), {file, at, size}) do
        {:ok, payload} -> {:ok, open(message, payload)}
        {:error, sentence} -> {:error, %RuntimeError{message: "one whose payload #{sentence}"}}
      end
    end
  end

  def decode(frame, _read) do
    with {:ok, %{} = message} <- MessagePack.decode(frame), do: {:ok, open(message, <<>>)}
  end

  @doc "Reads nothing: there is no shared memory."
  def nowhere(_id, _place), do: {:error, "is said to be in shared memory, of which there is none"}

  # What lies nowhere in the payload stays as it is, which is no batch.
  defp open(message, payload) do
    Enum.reduce(@received, message, fn key, message ->
      case message do
        %{^key => %{"data" => [at, size]} = batch}
        when is_integer(at) and is_integer(size) and at >= 0 and size >= 0 and
               at + size <= byte_size(payload) ->
          %{message | key => %{batch | "data" => binary_part(payload, at, size)}}

        _no_such_batch ->
          message
      end
    end)
  end
end
