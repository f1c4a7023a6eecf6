defmodule Tinkex.CustomLoss.Test.Vectors do
  @moduledoc "The messages of tests/vectors; their README says how they are written."

  alias Tinkex.CustomLoss.Wire.{Batch, MessagePack}
  alias Tinkex.CustomLoss.Wire.MessagePack.{Ext, Timestamp}
  alias Tinkex.CustomLoss.Test.JSON

  @directory Path.expand("../../vectors", __DIR__)

  def formats, do: "formats.json" |> read() |> Enum.map(&vector(&1["name"], &1))
  def invalid, do: "invalid.json" |> read() |> Enum.map(&vector(&1["name"], &1))

  @doc "Records of parts, and what they merge to, or nil where they are refused."
  def merges do
    for json <- read("merge.json"),
        do: %{
          name: json["name"],
          records: value(json["records"]),
          merged: value(json["merged"])
        }
  end

  def messages do
    for file <- @directory |> Path.join("messages") |> File.ls!() |> Enum.sort() do
      message(Path.basename(file, ".json"))
    end
  end

  def message(name), do: vector(name, read("messages/#{name}.json"))

  defp read(file), do: @directory |> Path.join(file) |> File.read!() |> JSON.decode!()

  defp vector(name, json) do
    %{
      name: name,
      frame: Base.decode16!(json["hex"], case: :lower),
      value: value(json["value"]),
      payload: Base.decode16!(Map.get(json, "payload", ""), case: :lower),
      canonical?: Map.get(json, "canonical", true),
      from: json["from"]
    }
  end

  defp value(%{"$bin" => hex}), do: {:bin, Base.decode16!(hex, case: :lower)}
  defp value(%{"$float" => "nan"}), do: :nan
  defp value(%{"$float" => "infinity"}), do: :infinity
  defp value(%{"$float" => "neg_infinity"}), do: :neg_infinity

  defp value(%{"$ext" => [type, hex]}),
    do: %Ext{type: type, data: Base.decode16!(hex, case: :lower)}

  defp value(%{"$timestamp" => [seconds, nanoseconds]}),
    do: %Timestamp{seconds: seconds, nanoseconds: nanoseconds}

  defp value(%{} = map), do: Map.new(map, fn {key, value} -> {key, value(value)} end)
  defp value(list) when is_list(list), do: Enum.map(list, &value/1)
  defp value(scalar), do: scalar

  @doc "The payload of a frame, and the MessagePack of its message."
  def split(<<0xC6, size::32, payload::binary-size(size), message::binary>>),
    do: {payload, message}

  def split(message), do: {<<>>, message}

  @doc "The frame of a payload and a message."
  def join(payload, message) do
    header = if payload == "", do: "", else: <<0xC6, byte_size(payload)::32>>
    IO.iodata_to_binary([header, payload, MessagePack.encode(message)])
  end

  @doc "Shapes, from their one piece."
  def shapes(packed) do
    {:ok, shapes} = Batch.unpack_shapes(packed)
    shapes
  end

  @doc "The message of a frame, with the bytes of each batch as its data, and its shapes as lists."
  def open(frame) do
    {payload, message} = split(frame)
    {:ok, message} = MessagePack.decode(message)
    opened(message, payload)
  end

  defp opened(%{"data" => [at, size], "dtype" => _} = batch, payload),
    do: %{batch | "data" => binary_part(payload, at, size), "shapes" => shapes(batch["shapes"])}

  defp opened(%{} = map, payload) when not is_struct(map),
    do: Map.new(map, fn {key, value} -> {key, opened(value, payload)} end)

  defp opened(list, payload) when is_list(list), do: Enum.map(list, &opened(&1, payload))
  defp opened(other, _payload), do: other

  @doc "What decoding yields for a term that was encoded: bins and strings are both binaries."
  def decoded({:bin, bytes}), do: IO.iodata_to_binary(bytes)
  def decoded(list) when is_list(list), do: Enum.map(list, &decoded/1)
  def decoded(%_{} = struct), do: struct

  def decoded(%{} = map),
    do: Map.new(map, fn {key, value} -> {to_string(key), decoded(value)} end)

  def decoded(scalar), do: scalar
end
