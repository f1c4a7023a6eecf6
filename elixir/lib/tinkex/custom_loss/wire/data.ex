defmodule Tinkex.CustomLoss.Wire.Data do
  @moduledoc """
  Datums: to the wire, so that terms see them, and into the linear loss that trains on a gradient.

  A datum is a `Tinkex.Types.Datum`, or any map with the same keys, as atoms or strings:

    * `model_input` - a `ModelInput` or map with `chunks`, or a plain list of tokens. A chunk has a
      `type`: `"encoded_text"` with `tokens`; `"image"` with `data` (base64, or `{:bin, bytes}`),
      `format` and `expected_tokens`; `"image_asset_pointer"` with `location`, `format` and
      `expected_tokens`.
    * `loss_fn_inputs` - a map from a name to a tensor in any form of `Tinkex.CustomLoss.Wire.Tensor`.
      Not every datum needs to have every name, but those of one name have one dtype.

  A tensor that does not say its dtype is int64 under `target_tokens` and float32 under any other
  name, whatever its numbers look like: a mask `[1, 0, 1]` is one of floats. Integers of another
  name come as a `TensorData`, an Nx tensor or `{binary, shape, :int64}`.

  Whatever cannot be read raises `ArgumentError` with its path, such as
  `data[3].loss_fn_inputs.weights`.
  """

  alias Tinkex.CustomLoss.Wire.{Batch, MessagePack, Numbers, Tensor}

  @type datum :: %{
          optional(:model_input | String.t()) => term(),
          optional(:loss_fn_inputs | String.t()) => %{
            optional(atom() | String.t()) => Tensor.t()
          }
        }

  @doc """
  The `data` of a compute message (docs/protocol.md, "Data") for `Frame.encode/1`, nil for nil.

  `count` is the number of logprob tensors that the datums belong to.
  """
  @spec to_wire([datum()] | nil, non_neg_integer()) :: map() | nil
  def to_wire(nil, _count), do: nil

  def to_wire(data, count) when length(data) == count do
    inputs = Enum.with_index(data, &elem(loss_fn_inputs(&1, [&2, "data"]), 1))
    chunks = Enum.with_index(data, &chunks(&1, ["model_input", &2, "data"]))

    %{"count" => count, "inputs" => input_batches(inputs)}
    |> put_tokens(chunks)
    |> put_chunks(chunks)
  end

  def to_wire(data, count) when is_list(data) do
    proper!(data, ["data"])

    raise ArgumentError,
          "data has #{datums(length(data))}, but there are logprobs of #{count}; " <>
            "give one tensor of logprobs a datum"
  end

  def to_wire(other, _count),
    do: raise(ArgumentError, "data must be nil or a list of datums, got: #{shown(other)}")

  @doc """
  The datums whose cross-entropy has this gradient: what a training client is sent.

  `gradients` is the batch of ∂loss/∂logprobs. Each datum keeps its model input and its target
  tokens, untouched, and gets `weights = -gradient` in the form of its target tokens; other loss
  inputs are left out, since the server's cross-entropy takes no others. Its loss `Σ -logprob ·
  weight` has, by the chain rule, the parameter gradient of the custom loss.
  """
  @spec linear([datum()], Batch.t()) :: [datum()]
  def linear(data, %Batch{shapes: shapes} = gradients) when length(data) == length(shapes) do
    [data, Batch.parts(gradients), shapes]
    |> Enum.zip()
    |> Enum.with_index(fn {datum, part, shape}, index ->
      path = [index, "data"]
      {key, inputs} = loss_fn_inputs(datum, path)
      {tokens_key, weights_key, tokens} = target_tokens(inputs, path)
      weights = weights(part, gradients.dtype, path)
      weights = Tensor.write_like(tokens, weights, shape, [tokens_key, "loss_fn_inputs" | path])
      Map.put(datum, key, %{tokens_key => tokens, weights_key => weights})
    end)
  end

  def linear(data, %Batch{shapes: shapes}) do
    raise ArgumentError,
          "data has #{datums(length(data))}, but there are gradients of #{length(shapes)}"
  end

  defp datums(1), do: "1 datum"
  defp datums(count), do: "#{count} datums"

  defp weights(part, dtype, path) do
    case Numbers.negate(part, dtype) do
      {:ok, float32} -> float32
      :error -> refuse!(path, "cannot be trained on: its gradient is not finite in float32")
    end
  end

  defp target_tokens(inputs, path) do
    case inputs do
      %{"target_tokens" => tokens} -> {"target_tokens", "weights", tokens}
      %{target_tokens: tokens} -> {:target_tokens, :weights, tokens}
      _ -> refuse!(["loss_fn_inputs" | path], "has no target_tokens, which cross-entropy needs")
    end
  end

  defp loss_fn_inputs(datum, path) do
    {key, inputs} =
      case datum do
        %{loss_fn_inputs: inputs} -> {:loss_fn_inputs, inputs}
        %{"loss_fn_inputs" => inputs} -> {"loss_fn_inputs", inputs}
        %{} -> {:loss_fn_inputs, nil}
        other -> refuse!(path, "is #{shown(other)}; expected a datum")
      end

    case inputs do
      nil -> {key, %{}}
      inputs when is_map(inputs) and not is_struct(inputs) -> {key, inputs}
      other -> refuse!(["loss_fn_inputs" | path], "is #{shown(other)}; expected a map")
    end
  end

  # The inputs of each datum become one batch a name, which may be a string here and an atom there.
  defp input_batches(inputs) do
    keys =
      inputs |> Enum.reduce(%{}, &Map.merge/2) |> Map.keys() |> Enum.group_by(&name(&1, inputs))

    Map.new(keys, fn {name, keys} ->
      default = if name == "target_tokens", do: :int64, else: :float32
      # Where a datum has both, the string counts.
      tensors = column(inputs, Enum.sort(keys, :desc))
      {name, Tensor.batch(tensors, default, &[name, "loss_fn_inputs", &1, "data"])}
    end)
  end

  defp name(name, _inputs) when is_binary(name), do: name
  defp name(name, _inputs) when is_atom(name), do: Atom.to_string(name)

  defp name(other, inputs) do
    index = Enum.find_index(inputs, &is_map_key(&1, other))
    refuse!(["loss_fn_inputs", index, "data"], "has the key #{shown(other)}; expected a string")
  end

  defp column([inputs | rest], keys), do: [find(inputs, keys) | column(rest, keys)]
  defp column([], _keys), do: []

  defp find(inputs, [key | keys]) do
    case inputs do
      %{^key => tensor} -> tensor
      %{} -> find(inputs, keys)
    end
  end

  defp find(_inputs, []), do: nil

  # The model input of each datum is a list of chunks: {:text, tokens}, or a chunk of the wire. In
  # the common case of one chunk of text, the tokens of all datums travel as one batch.

  defp put_tokens(wire, chunks) do
    tokens =
      Enum.map(chunks, fn
        [{:text, tokens}] -> tokens
        _ -> nil
      end)

    if Enum.all?(tokens, &is_nil/1),
      do: wire,
      else: Map.put(wire, "tokens", tokens(tokens, &["model_input", &1, "data"]))
  end

  defp put_chunks(wire, chunks) do
    if Enum.all?(chunks, &(&1 == [] or match?([{:text, _tokens}], &1))) do
      wire
    else
      Map.put(
        wire,
        "chunks",
        Enum.with_index(chunks, fn
          [{:text, _tokens}], _index -> nil
          chunks, index -> Enum.with_index(chunks, &wire_chunk(&1, &2, index))
        end)
      )
    end
  end

  defp wire_chunk({:text, tokens}, index, datum) do
    path = [index, "chunks", "model_input", datum, "data"]
    %{"type" => "encoded_text", "tokens" => tokens([tokens], fn 0 -> path end)}
  end

  defp wire_chunk(chunk, _index, _datum), do: chunk

  defp tokens(tokens, path) do
    batch = Tensor.batch(tokens, :int64, path)

    with index when is_integer(index) <- Enum.find_index(batch.shapes, &match?([_, _ | _], &1)) do
      refuse!(path.(index), "has tokens of shape #{shown(Enum.at(batch.shapes, index))}, not [n]")
    end

    if Numbers.float?(batch.dtype),
      do: refuse!(path.(0), "has tokens of #{batch.dtype}, which is no type of integers")

    batch
  end

  defp chunks(datum, path) do
    case get(datum, :model_input) do
      nil -> []
      tokens when is_list(tokens) -> [{:text, tokens}]
      %{} = input -> input |> get(:chunks) |> chunk_list(["chunks" | path])
      other -> refuse!(path, "is #{shown(other)}; expected chunks or a list of tokens")
    end
  end

  defp chunk_list(chunks, path) when is_list(chunks) do
    proper!(chunks, path)
    Enum.with_index(chunks, &chunk(&1, [&2 | path]))
  end

  defp chunk_list(other, path), do: refuse!(path, "is #{shown(other)}; expected a list of chunks")

  defp chunk(%{} = chunk, path) do
    case text(chunk, :type, path) do
      "encoded_text" ->
        {:text, get(chunk, :tokens) || refuse!(["tokens" | path], "is missing")}

      "image" ->
        %{
          "type" => "image",
          "data" => {:bin, image(get(chunk, :data), ["data" | path])},
          "format" => text(chunk, :format, path),
          # Where there is no advisory count, Tinkex's own: a term may ask for the input's length.
          "expected_tokens" => get(chunk, :expected_tokens) || get(chunk, :tokens)
        }

      "image_asset_pointer" ->
        %{
          "type" => "image_asset_pointer",
          "location" => text(chunk, :location, path),
          "format" => text(chunk, :format, path),
          "expected_tokens" => get(chunk, :expected_tokens)
        }

      other ->
        refuse!(
          ["type" | path],
          "is #{inspect(other)}; expected encoded_text, image or image_asset_pointer"
        )
    end
  end

  defp chunk(other, path), do: refuse!(path, "is #{shown(other)}; expected a chunk")

  defp text(chunk, key, path) do
    case get(chunk, key) do
      text when is_binary(text) -> text
      atom when is_atom(atom) and not is_nil(atom) -> Atom.to_string(atom)
      other -> refuse!([key | path], "is #{shown(other)}; expected a string")
    end
  end

  defp image({:bin, bytes}, _path), do: bytes

  defp image(base64, path) when is_binary(base64) do
    case Base.decode64(base64) do
      {:ok, bytes} -> bytes
      :error -> refuse!(path, "is not base64; give the image's bytes as {:bin, bytes}")
    end
  end

  defp image(other, path),
    do: refuse!(path, "is #{shown(other)}; expected base64 or {:bin, bytes}")

  # Structs and JSON: the same keys as atoms or as strings.
  defp get(map, key) do
    case map do
      %{^key => value} -> value
      %{} -> Map.get(map, Atom.to_string(key))
    end
  end

  defp proper!(list, path) do
    if List.improper?(list),
      do: refuse!(path, "is an improper list; expected one that ends in []")
  end

  defp shown(term), do: inspect(term, limit: 5, printable_limit: 40, charlists: :as_lists)

  @spec refuse!([atom() | String.t() | non_neg_integer()], String.t()) :: no_return()
  defp refuse!(path, sentence),
    do: raise(ArgumentError, "#{MessagePack.format_path(path)} #{sentence}")
end
