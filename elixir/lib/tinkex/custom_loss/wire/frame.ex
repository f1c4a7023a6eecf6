defmodule Tinkex.CustomLoss.Wire.Frame do
  @moduledoc """
  A frame of docs/protocol.md: a message, which is a map, and before it the bytes of its tensors.

  Both are MessagePack, the tensors as one bin, the *payload*, and a batch in the message says where
  in it its bytes lie. So the message is small for whoever reads it, and the tensors are referred to
  and not copied, in both directions.
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

  @doc "The message of a frame; the `data` of its batches are parts of the frame."
  @spec decode(binary()) :: {:ok, term()} | {:error, MessagePack.DecodeError.t()}
  def decode(<<0xC6, size::32, payload::binary-size(size), message::binary>>) do
    with {:ok, %{} = message} <- MessagePack.decode(message), do: {:ok, open(message, payload)}
  end

  def decode(frame) do
    with {:ok, %{} = message} <- MessagePack.decode(frame), do: {:ok, open(message, <<>>)}
  end

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
