defmodule Tinkex.CustomLoss.VectorsTest do
  use ExUnit.Case, async: true

  alias Tinkex.CustomLoss.Test.Vectors
  alias Tinkex.CustomLoss.Wire.{Batch, MessagePack, Protocol}

  test "every format decodes to its value, and its canonical form is what we encode" do
    for vector <- Vectors.formats() do
      assert {:ok, value} = MessagePack.decode(vector.frame), vector.name
      assert value === Vectors.decoded(vector.value), vector.name

      if vector.canonical?, do: assert(frame(vector.value) == vector.frame, vector.name)
    end
  end

  test "every message decodes to its value and encodes to its bytes" do
    for vector <- Vectors.messages() do
      {payload, message} = Vectors.split(vector.frame)
      assert payload == vector.payload
      assert MessagePack.decode(message) === {:ok, Vectors.decoded(vector.value)}, vector.name
      assert Vectors.join(payload, vector.value) == vector.frame, vector.name
    end
  end

  test "every invalid frame is refused" do
    for vector <- Vectors.invalid() do
      assert {:error, %MessagePack.DecodeError{}} = MessagePack.decode(vector.frame), vector.name
    end
  end

  test "every message of the host is what the protocol encodes for the same request" do
    host = Enum.filter(Vectors.messages(), &(&1.from == "host"))
    assert length(host) > 10

    for vector <- host,
        do: assert(request(vector.value, vector.payload) == vector.frame, vector.name)
  end

  test "every message of the worker is understood" do
    for vector <- Vectors.messages(), vector.from == "worker" do
      id = vector.value["id"]

      case {vector.value["op"], Protocol.decode(vector.frame)} do
        {"ready", {:ready, ready}} -> assert ready.protocol == vector.value["protocol"]
        {"result", {:result, ^id, _}} -> :ok
        {"result", {:error, ^id, %{kind: :protocol}}} -> assert vector.name =~ "ext_as_loss"
        {"error", {:error, ^id, error}} -> same_error(error, vector.value["error"])
        {"log", {:log, log}} -> assert to_string(log.level) == vector.value["level"]
        {_op, other} -> flunk("#{vector.name}: #{inspect(other)}")
      end
    end
  end

  defp same_error(error, wire) do
    for {key, value} <- error do
      assert if(key == :kind, do: to_string(value), else: value) == wire[to_string(key)]
    end
  end

  defp request(%{"op" => "compute"} = message, payload),
    do: message |> fields(payload) |> Protocol.encode_compute() |> binary()

  defp request(%{"op" => "totals"} = message, payload),
    do: message |> fields(payload) |> Protocol.encode_totals() |> binary()

  defp request(%{"op" => "cancel", "id" => id}, ""), do: binary(Protocol.encode_cancel(id))
  defp request(%{"op" => "terms", "id" => id}, ""), do: binary(Protocol.encode_terms(id))
  defp request(%{"op" => "ping", "id" => id}, ""), do: binary(Protocol.encode_ping(id))

  defp fields(message, payload),
    do:
      Map.new(message, fn {key, value} ->
        {String.to_existing_atom(key), batches(value, payload)}
      end)

  defp batches(%{"data" => [at, size], "dtype" => _} = wire, payload) do
    wire = %{Vectors.decoded(wire) | "data" => binary_part(payload, at, size)}
    {:ok, batch} = Batch.from_wire(wire)
    batch
  end

  defp batches(%{} = map, payload),
    do: Map.new(map, fn {key, value} -> {key, batches(value, payload)} end)

  defp batches(list, payload) when is_list(list), do: Enum.map(list, &batches(&1, payload))
  defp batches(other, _payload), do: other

  defp frame(term), do: term |> MessagePack.encode() |> binary()
  defp binary(iodata), do: IO.iodata_to_binary(iodata)
end
