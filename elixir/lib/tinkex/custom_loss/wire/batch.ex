defmodule Tinkex.CustomLoss.Wire.Batch do
  @moduledoc """
  All tensors of one kind of a batch, one a datum, in one piece of memory: how tensors travel.

    * `data` - iodata: the tensors one after another, row-major, little-endian
    * `dtype` - `:float32`, `:float64`, `:float16`, `:bfloat16`, `:int64` or `:int32`
    * `shapes` - one list of sizes a datum, or nil where the datum has no such tensor
    * `forms` - how each tensor was given, so that its gradient can go back in the same form
  """

  alias Tinkex.CustomLoss.Wire.Numbers

  @enforce_keys [:dtype, :shapes, :data]
  defstruct [:dtype, :shapes, :data, forms: []]

  @type shape :: [non_neg_integer()]
  @type t :: %__MODULE__{
          dtype: Numbers.dtype(),
          shapes: [shape() | nil],
          data: iodata(),
          forms: [term()]
        }

  @doc "The batch as a map of the wire, its data being the `size` bytes from `at` on of a payload."
  @spec to_wire(t(), non_neg_integer(), non_neg_integer()) :: map()
  def to_wire(%__MODULE__{} = batch, at, size) do
    %{
      "data" => [at, size],
      "dtype" => Atom.to_string(batch.dtype),
      "shapes" => {:bin, pack_shapes(batch.shapes, <<>>)}
    }
  end

  # Of each datum how many sizes, and the sizes: a thousand short arrays take longer to read and to
  # write than one piece.
  @most 0xFFFFFFFF

  defp pack_shapes([[size] | rest], packed) when size <= @most,
    do: pack_shapes(rest, <<packed::binary, 1::32-little, size::32-little>>)

  defp pack_shapes([nil | rest], packed),
    do: pack_shapes(rest, <<packed::binary, @most::32-little>>)

  defp pack_shapes([shape | rest], packed) do
    if Enum.any?(shape, &(&1 > @most)) do
      raise ArgumentError, "a tensor has the shape #{inspect(shape)}; a size is at most #{@most}"
    end

    sizes = for size <- shape, into: <<>>, do: <<size::32-little>>
    pack_shapes(rest, <<packed::binary, length(shape)::32-little, sizes::binary>>)
  end

  defp pack_shapes([], packed), do: packed

  @doc """
  The batch in a map from the wire whose `data` was taken from the payload; it is a part of the frame.

  On error, says what is wrong and where in the map.
  """
  @spec from_wire(term()) :: {:ok, t()} | {:error, path :: [String.t() | integer()], String.t()}
  def from_wire(%{"data" => data, "dtype" => name, "shapes" => shapes}) do
    with {:ok, dtype} <- check_dtype(name),
         {:ok, shapes} <- unpack_shapes(shapes),
         :ok <- check_data(data, shapes, dtype) do
      {:ok, %__MODULE__{dtype: dtype, shapes: shapes, data: data}}
    end
  end

  def from_wire(%{} = map) do
    missing = Enum.find(["data", "dtype", "shapes"], &(not is_map_key(map, &1)))
    {:error, [missing], "is missing"}
  end

  def from_wire(_other), do: {:error, [], "is not a batch"}

  defp check_dtype(name) do
    with :error <- Numbers.dtype(name), do: {:error, ["dtype"], "is not a dtype of the protocol"}
  end

  @doc "The shapes of a batch, from their one piece; on error as `from_wire/1`."
  @spec unpack_shapes(term()) ::
          {:ok, [shape() | nil]} | {:error, path :: [String.t()], String.t()}
  def unpack_shapes(packed) when is_binary(packed), do: unpack_shapes(packed, [])
  def unpack_shapes(_other), do: {:error, ["shapes"], "is not a bin"}

  defp unpack_shapes(<<1::32-little, size::32-little, rest::binary>>, shapes),
    do: unpack_shapes(rest, [[size] | shapes])

  defp unpack_shapes(<<@most::32-little, rest::binary>>, shapes),
    do: unpack_shapes(rest, [nil | shapes])

  defp unpack_shapes(<<rank::32-little, rest::binary>>, shapes)
       when byte_size(rest) >= 4 * rank do
    <<sizes::binary-size(4 * rank), rest::binary>> = rest
    unpack_shapes(rest, [for(<<size::32-little <- sizes>>, do: size) | shapes])
  end

  defp unpack_shapes(<<>>, shapes), do: {:ok, Enum.reverse(shapes)}

  defp unpack_shapes(_cut, shapes),
    do: {:error, ["shapes"], "end within those of datum #{length(shapes)}"}

  defp check_data(data, shapes, dtype) when is_binary(data) do
    expected = Numbers.size(dtype) * Enum.reduce(shapes, 0, &(count(&1) + &2))

    if byte_size(data) == expected,
      do: :ok,
      else: {:error, ["data"], "has #{byte_size(data)} bytes; its shapes hold #{expected}"}
  end

  defp check_data(_data, _shapes, _dtype), do: {:error, ["data"], "lies nowhere in the payload"}

  @doc "Whether a term is a list of sizes."
  @spec shape?(term()) :: boolean()
  def shape?([size | rest]) when is_integer(size) and size >= 0, do: shape?(rest)
  def shape?(other), do: other == []

  @doc "How many values a tensor of this shape holds; 0 for nil."
  @spec count(shape() | nil) :: non_neg_integer()
  def count(nil), do: 0
  def count([size]), do: size
  def count(shape), do: Enum.reduce(shape, 1, &(&1 * &2))

  @doc "Each datum's bytes, as parts of the batch's: nil where it has none."
  @spec parts(t()) :: [binary() | nil]
  def parts(%__MODULE__{dtype: dtype, shapes: shapes, data: data}),
    do: split(shapes, IO.iodata_to_binary(data), Numbers.size(dtype))

  defp split([nil | shapes], data, size), do: [nil | split(shapes, data, size)]

  defp split([shape | shapes], data, size) do
    bytes = size * count(shape)
    <<part::binary-size(bytes), rest::binary>> = data
    [part | split(shapes, rest, size)]
  end

  defp split([], <<>>, _size), do: []

  defimpl Inspect do
    # Shapes, never data.
    def inspect(batch, _opts) do
      {shown, more} = Enum.split(batch.shapes, 3)
      shapes = Enum.map_join(shown, ", ", &Kernel.inspect(&1, charlists: :as_lists))
      rest = if more == [], do: "", else: ", … #{length(batch.shapes)} in all"
      "#Tinkex.CustomLoss.Wire.Batch<#{batch.dtype}, [#{shapes}#{rest}]>"
    end
  end
end
