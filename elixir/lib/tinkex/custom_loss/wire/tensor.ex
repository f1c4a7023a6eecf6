defmodule Tinkex.CustomLoss.Wire.Tensor do
  @moduledoc """
  A tensor in any of the forms that Elixir programs have it in, to and from bytes.

  | form | example |
  |---|---|
  | list, flat or nested | `[-0.1, -2.3]`, `[[-0.1, -2.3], [-1.2, -0.4]]` |
  | Nx tensor | any float type and backend; integers for inputs |
  | Tinkex `TensorData`, or such a map | `%{data: [-0.1, -2.3], dtype: :float32, shape: [2]}` |
  | output of a forward pass | `%{"logprobs" => %{"data" => [-0.1], "dtype" => "float32", "shape" => [1]}}` |
  | bytes, little-endian | `{binary, [2]}`, `{binary, {2}, :float64}` |

  In a map, keys and dtype may be atoms or strings, `data` a flat list or a binary, and the shape
  nil, for one dimension. Numbers of a list may be integers and, where the dtype is a float, `:nan`,
  `:infinity` and `:neg_infinity`. Bytes are never copied.

  Every function raises `ArgumentError` with a sentence that begins with the path of the tensor,
  such as `logprobs[2]`, whose index is that of the datum.
  """

  alias Tinkex.CustomLoss.Wire.{Batch, Lists, MessagePack, Numbers}

  @type t ::
          [number() | Numbers.non_finite() | list()]
          | %{__struct__: Nx.Tensor}
          | map()
          | {binary(), shape()}
          | {binary(), shape(), dtype :: atom() | String.t()}

  @type shape :: [non_neg_integer()] | tuple()
  @typep path :: [String.t() | non_neg_integer()]

  @doc """
  The batch of a list of logprobs, one `[T]` or `[T, K]` a datum.

  Lists are float32. All of a batch must have one dtype: nothing is converted behind one's back.

      iex> Tinkex.CustomLoss.Wire.Tensor.logprobs([[-0.5, -1.0], {<<0, 0, 128, 191>>, [1]}])
      #Tinkex.CustomLoss.Wire.Batch<float32, [[2], [1]]>
  """
  @spec logprobs([t()]) :: Batch.t()
  def logprobs(tensors) when is_list(tensors) do
    batch = batch(tensors, :float32, &[&1, "logprobs"])
    check_logprobs(batch.shapes, 0)

    Numbers.float?(batch.dtype) ||
      refuse!([0, "logprobs"], "is #{batch.dtype}; logprobs are floating-point numbers")

    batch
  end

  def logprobs(other) do
    raise ArgumentError,
          "logprobs must be a list with one tensor a datum, got: #{shown(other)}"
  end

  defp check_logprobs([shape | rest], index) when length(shape) in 1..2,
    do: check_logprobs(rest, index + 1)

  defp check_logprobs([nil | _], index),
    do: refuse!([index, "logprobs"], "is nil; every datum has logprobs")

  defp check_logprobs([shape | _], index),
    do: refuse!([index, "logprobs"], "has shape #{shown(shape)}; expected [T] or [T, K]")

  defp check_logprobs([], _index), do: :ok

  @doc """
  The batch of tensors, nil where a datum has none; `path` gives the path of the n-th.

  `default` is the dtype of those that do not say theirs: lists, `{binary, shape}`.
  """
  @spec batch([t() | nil], Numbers.dtype(), (non_neg_integer() -> path())) :: Batch.t()
  def batch(tensors, default, path) do
    {dtype, shapes, data, forms} = gather(tensors, 0, default, path, nil)
    %Batch{dtype: dtype || default, shapes: shapes, data: data, forms: forms}
  end

  # `first` is the dtype of the batch with the path of the tensor that set it.
  defp gather([nil | rest], index, default, path, first) do
    {dtype, shapes, data, forms} = gather(rest, index + 1, default, path, first)
    {dtype, [nil | shapes], data, [nil | forms]}
  end

  defp gather([tensor | rest], index, default, path, first) do
    here = path.(index)
    {dtype, shape, values, form} = read(tensor, default, here)
    first = first || {dtype, here}
    check_dtype(dtype, here, first)
    bytes = pack(values, dtype, here)
    {_dtype, shapes, data, forms} = gather(rest, index + 1, default, path, first)
    {dtype, [shape | shapes], [bytes | data], [form | forms]}
  end

  defp gather([], _index, _default, _path, _first), do: {nil, [], [], []}

  defp gather(end_of_list, index, _default, path, _first),
    do: refuse!(path.(index), "is the end of an improper list, #{shown(end_of_list)}")

  defp check_dtype(dtype, _here, {dtype, _there}), do: :ok

  defp check_dtype(dtype, here, {other, there}) do
    refuse!(
      here,
      "is #{dtype}, but #{MessagePack.format_path(there)} is #{other}; a batch has one dtype"
    )
  end

  defp pack(binary, _dtype, _path) when is_binary(binary), do: binary

  defp pack(list, dtype, path) do
    case Numbers.pack(list, dtype) do
      {:ok, binary} -> binary
      {:error, sentence} -> refuse!(path, sentence)
    end
  end

  @doc """
  Gradients in the form in which each tensor of `batch` was given.

  Lists, `TensorData` and maps get floats, Nx tensors a tensor of the same type, binaries a part of
  the gradients' binary. An answer whose shapes or dtype are not those of the question is an error.
  """
  @spec restore(gradients :: Batch.t(), Batch.t()) :: {:ok, [t()]} | {:error, String.t()}
  def restore(%Batch{dtype: dtype, shapes: shapes} = gradients, %Batch{} = batch) do
    with :ok <- check_gradients(gradients, batch) do
      values = batch.forms |> wanted(Batch.parts(gradients), shapes) |> Lists.of(dtype)
      {:ok, write_all(batch.forms, values)}
    end
  end

  @doc "Whether these can be the gradients of `batch`."
  @spec check_gradients(gradients :: Batch.t(), Batch.t()) :: :ok | {:error, String.t()}
  def check_gradients(%Batch{} = gradients, %Batch{} = batch) do
    if gradients.dtype == batch.dtype and gradients.shapes == batch.shapes,
      do: :ok,
      else: {:error, "the gradients are #{inspect(gradients)}, the logprobs #{inspect(batch)}"}
  end

  # For Lists: of each form its bytes, and the shape of the list that it takes, if it takes one.
  defp wanted([form | forms], [bytes | parts], [shape | shapes]),
    do: [{bytes, list_shape(form, shape)} | wanted(forms, parts, shapes)]

  defp wanted([], [], []), do: []

  defp list_shape(:list, shape), do: shape
  defp list_shape({:data, _map, _keys, :list}, shape), do: [Batch.count(shape)]
  defp list_shape({:within, _map, _key, form}, shape), do: list_shape(form, shape)
  defp list_shape(_bytes, _shape), do: nil

  defp write_all([form | forms], [value | values]),
    do: [write(form, value) | write_all(forms, values)]

  defp write_all([], []), do: []

  @doc false
  # Float32 values in the form of another tensor of any dtype: weights beside target tokens.
  @spec write_like(t(), binary(), Batch.shape(), path()) :: t()
  def write_like(tensor, float32, shape, path) do
    case read(tensor, :int64, path) do
      {_dtype, ^shape, _values, form} ->
        form = as_float32(form, shape)
        [value] = Lists.of([{float32, list_shape(form, shape)}], :float32)
        write(form, value)

      {_dtype, other, _values, _form} ->
        refuse!(path, "has shape #{shown(other)}, its gradient #{shown(shape)}")
    end
  end

  defp as_float32({:nx, _type, shape}, _shape), do: {:nx, {:f, 32}, shape}
  defp as_float32({:bytes, given, name}, _shape), do: {:bytes, given, like(name, :float32)}

  defp as_float32({:data, map, {_, dtype_key, shape_key} = keys, kind}, shape) do
    map = Map.put(map, dtype_key, like(Map.get(map, dtype_key) || dtype_key, :float32))
    {:data, Map.update(map, shape_key, shape, &(&1 || shape)), keys, kind}
  end

  defp as_float32(form, _shape), do: form

  defp like(name, dtype) when is_binary(name), do: Atom.to_string(dtype)
  defp like(_name, dtype), do: dtype

  defp write(nil, nil), do: nil
  defp write(:list, list), do: list
  defp write({:bytes, given}, bytes), do: {bytes, given}
  defp write({:bytes, given, name}, bytes), do: {bytes, given, name}

  defp write({:nx, type, shape}, bytes),
    do: apply(Nx, :reshape, [apply(Nx, :from_binary, [bytes, type]), shape])

  defp write({:data, map, {data_key, _, _}, _kind}, values), do: Map.put(map, data_key, values)
  defp write({:within, map, key, form}, value), do: Map.put(map, key, write(form, value))

  # A tensor as {dtype, shape, values, form}: values are bytes, or a flat list that is yet unread.
  defp read(list, default, path) when is_list(list) do
    shape = shape_of(list, path)
    {default, shape, flatten(list, shape), :list}
  end

  defp read({binary, given}, default, path) when is_binary(binary),
    do: read_bytes(binary, given, default, {:bytes, given}, path)

  defp read({binary, given, name}, _default, path) when is_binary(binary),
    do: read_bytes(binary, given, dtype!(name, path), {:bytes, given, name}, path)

  defp read(%{__struct__: Nx.Tensor} = tensor, _default, path) do
    {dtype, tensor} = nx_dtype(apply(Nx, :type, [tensor]), tensor, path)
    shape = apply(Nx, :shape, [tensor])
    form = {:nx, apply(Nx, :type, [tensor]), shape}
    read_bytes(apply(Nx, :to_binary, [tensor]), shape, dtype, form, path)
  end

  defp read(%{data: _} = map, default, path),
    do: read_data(map, {:data, :dtype, :shape}, default, path)

  defp read(%{"data" => _} = map, default, path),
    do: read_data(map, {"data", "dtype", "shape"}, default, path)

  defp read(%{"logprobs" => tensor} = map, default, path),
    do: read_within(map, "logprobs", tensor, default, path)

  defp read(%{logprobs: tensor} = map, default, path),
    do: read_within(map, :logprobs, tensor, default, path)

  defp read(other, _default, path) do
    refuse!(
      path,
      "is #{shown(other)}; expected a list of numbers, an Nx tensor, a TensorData, " <>
        "or {binary, shape}"
    )
  end

  defp read_within(map, key, tensor, default, path) do
    {dtype, shape, values, form} = read(tensor, default, path)
    {dtype, shape, values, {:within, Map.put(map, key, nil), key, form}}
  end

  defp read_data(map, {data_key, dtype_key, shape_key} = keys, default, path) do
    dtype = if name = Map.get(map, dtype_key), do: dtype!(name, path), else: default
    {data, map} = Map.get_and_update(map, data_key, &{&1, nil})
    given = Map.get(map, shape_key)

    cond do
      is_binary(data) ->
        given = given || [div(byte_size(data), Numbers.size(dtype))]
        read_bytes(data, given, dtype, {:data, map, keys, :bytes}, path)

      is_list(data) ->
        count = length!(data, path)
        shape = shape!(given || [count], path)
        check_count(Batch.count(shape), count, shape, "values", path)
        {dtype, shape, data, {:data, map, keys, :list}}

      true ->
        refuse!(path, "has data #{shown(data)}; expected a flat list of numbers or a binary")
    end
  end

  defp read_bytes(binary, given, dtype, form, path) do
    shape = shape!(given, path)
    expected = Numbers.size(dtype) * Batch.count(shape)
    check_count(expected, byte_size(binary), shape, "bytes of #{dtype}", path)
    {dtype, shape, binary, form}
  end

  defp check_count(count, count, _shape, _unit, _path), do: :ok

  defp check_count(expected, count, shape, unit, path) do
    refuse!(path, "has shape #{shown(shape)}, that is #{expected} #{unit}, but holds #{count}")
  end

  defp shape!(given, path) do
    shape = if is_tuple(given), do: Tuple.to_list(given), else: given

    if Batch.shape?(shape),
      do: shape,
      else: refuse!(path, "has the shape #{shown(given)}; expected a list of sizes, such as [T]")
  end

  defp dtype!(name, path) do
    case Numbers.dtype(name) do
      {:ok, dtype} ->
        dtype

      :error ->
        refuse!(
          path,
          "has the dtype #{shown(name)}; expected float32, float64, float16, bfloat16, int64 or int32"
        )
    end
  end

  defp nx_dtype({:f, 32}, tensor, _path), do: {:float32, tensor}
  defp nx_dtype({:f, 64}, tensor, _path), do: {:float64, tensor}
  defp nx_dtype({:f, 16}, tensor, _path), do: {:float16, tensor}
  defp nx_dtype({:bf, 16}, tensor, _path), do: {:bfloat16, tensor}
  defp nx_dtype({:s, 64}, tensor, _path), do: {:int64, tensor}
  defp nx_dtype({:s, 32}, tensor, _path), do: {:int32, tensor}

  # Masks and token ids come in all widths; the protocol has two.
  defp nx_dtype({kind, bits}, tensor, _path) when kind in [:s, :u] and bits < 64,
    do: {:int64, apply(Nx, :as_type, [tensor, {:s, 64}])}

  defp nx_dtype(type, _tensor, path),
    do: refuse!(path, "is an Nx tensor of type #{shown(type)}, which has no dtype here")

  defp shape_of([row | rows] = list, path) when is_list(row) do
    length = length!(list, path)
    shape = shape_of(row, path)

    Enum.each(rows, fn other ->
      is_list(other) || refuse!(path, "holds #{shown(other)} among its rows")
      other_shape = shape_of(other, path)

      other_shape == shape ||
        refuse!(path, "is ragged: a row of #{shown(shape)} and one of #{shown(other_shape)}")
    end)

    [length | shape]
  end

  defp shape_of(list, path), do: [length!(list, path)]

  defp length!(list, path) do
    length(list)
  rescue
    ArgumentError -> refuse!(path, "is an improper list; expected one that ends in []")
  end

  defp flatten(list, [_]), do: list
  defp flatten(list, [_ | shape]), do: flatten(:lists.append(list), shape)

  defp shown(term), do: inspect(term, limit: 5, printable_limit: 40, charlists: :as_lists)

  @spec refuse!(path(), String.t()) :: no_return()
  defp refuse!(path, sentence),
    do: raise(ArgumentError, "#{MessagePack.format_path(path)} #{sentence}")
end
