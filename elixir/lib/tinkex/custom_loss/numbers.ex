defmodule Tinkex.CustomLoss.Numbers do
  @moduledoc false
  # Flat lists of numbers <-> little-endian bytes. A training step turns hundreds of thousands of
  # them, so both directions take eight at a time: five times as fast as one (2.7 ms for 64 x 4096).

  @type dtype :: :float32 | :float64 | :float16 | :bfloat16 | :int64 | :int32
  @type non_finite :: :nan | :infinity | :neg_infinity

  @sizes %{float64: 8, float32: 4, float16: 2, bfloat16: 2, int64: 8, int32: 4}
  @dtypes Map.keys(@sizes)
  @names Map.new(@dtypes, &{Atom.to_string(&1), &1})

  @doc "Bytes of one value."
  @spec size(dtype()) :: 2 | 4 | 8
  def size(dtype), do: Map.fetch!(@sizes, dtype)

  @spec float?(dtype()) :: boolean()
  def float?(dtype), do: dtype in [:float32, :float64, :float16, :bfloat16]

  @doc "The dtype of that name, which may come from the wire: no atom is made."
  @spec dtype(term()) :: {:ok, dtype()} | :error
  def dtype(name) when is_binary(name), do: Map.fetch(@names, name)
  def dtype(name) when name in @dtypes, do: {:ok, name}
  def dtype(_name), do: :error

  @doc "The bytes of a list, or what is wrong with which of its values."
  @spec pack(list(), dtype()) :: {:ok, binary()} | {:error, String.t()}
  def pack([], _dtype), do: {:ok, <<>>}

  def pack(_list, :bfloat16),
    do: {:error, "is a list, which cannot be bfloat16; give a binary, or float32"}

  def pack(list, dtype) do
    {:ok, pack(list, dtype, <<>>)}
  rescue
    # The fast path takes numbers that fit. Names the value that does not, or packs what it cannot.
    ArgumentError -> pack_each(list, dtype, 0, [])
    FunctionClauseError -> pack_each(list, dtype, 0, [])
  end

  # Within these bounds an integer is one machine word, and comparing costs nothing.
  defguardp is_word(n) when is_integer(n) and n in -0x400000000000000..0x3FFFFFFFFFFFFFF

  for {dtype, bits} <- [float64: 64, float32: 32, float16: 16] do
    defp pack([a, b, c, d, e, f, g, h | rest], unquote(dtype), packed) do
      pack(
        rest,
        unquote(dtype),
        <<packed::binary, a::float-little-unquote(bits), b::float-little-unquote(bits),
          c::float-little-unquote(bits), d::float-little-unquote(bits),
          e::float-little-unquote(bits), f::float-little-unquote(bits),
          g::float-little-unquote(bits), h::float-little-unquote(bits)>>
      )
    end

    defp pack([a | rest], unquote(dtype), packed),
      do: pack(rest, unquote(dtype), <<packed::binary, a::float-little-unquote(bits)>>)
  end

  defp pack([a, b, c, d, e, f, g, h | rest], :int64, packed)
       when is_word(a) and is_word(b) and is_word(c) and is_word(d) and
              is_word(e) and is_word(f) and is_word(g) and is_word(h) do
    pack(
      rest,
      :int64,
      <<packed::binary, a::64-little, b::64-little, c::64-little, d::64-little, e::64-little,
        f::64-little, g::64-little, h::64-little>>
    )
  end

  defp pack([a | rest], :int64, packed) when a in -0x8000000000000000..0x7FFFFFFFFFFFFFFF,
    do: pack(rest, :int64, <<packed::binary, a::64-little>>)

  defp pack([a | rest], :int32, packed) when a in -0x80000000..0x7FFFFFFF,
    do: pack(rest, :int32, <<packed::binary, a::32-little>>)

  defp pack([], _dtype, packed), do: packed

  defp pack_each([value | rest], dtype, index, packed) do
    case pack_one(value, dtype) do
      {:ok, bytes} -> pack_each(rest, dtype, index + 1, [packed, bytes])
      {:error, why} -> {:error, "holds #{shown(value)} at #{index}, #{why}"}
    end
  end

  defp pack_each([], _dtype, _index, packed), do: {:ok, IO.iodata_to_binary(packed)}
  defp pack_each(_tail, _dtype, _index, _packed), do: {:error, "is an improper list"}

  defp pack_one(value, dtype) when is_number(value) do
    {:ok, pack([value], dtype, <<>>)}
  rescue
    ArgumentError -> {:error, "which #{dtype} cannot hold"}
    FunctionClauseError -> {:error, "which #{dtype} cannot hold"}
  end

  for {dtype, nan, infinity, neg_infinity} <- [
        {:float64, <<0x7FF8000000000000::64-little>>, <<0x7FF0000000000000::64-little>>,
         <<0xFFF0000000000000::64-little>>},
        {:float32, <<0x7FC00000::32-little>>, <<0x7F800000::32-little>>,
         <<0xFF800000::32-little>>},
        {:float16, <<0x7E00::16-little>>, <<0x7C00::16-little>>, <<0xFC00::16-little>>}
      ] do
    defp pack_one(:nan, unquote(dtype)), do: {:ok, unquote(nan)}
    defp pack_one(:infinity, unquote(dtype)), do: {:ok, unquote(infinity)}
    defp pack_one(:neg_infinity, unquote(dtype)), do: {:ok, unquote(neg_infinity)}
  end

  defp pack_one(value, _dtype) when is_binary(value),
    do: {:error, "a string; a non-finite number is :nan, :infinity or :neg_infinity"}

  defp pack_one(_value, _dtype), do: {:error, "which is not a number"}

  defp shown(value), do: inspect(value, limit: 3, printable_limit: 20)

  @doc "The floats of a binary; non-finite ones are the atoms that Nx uses."
  @spec unpack(binary(), dtype()) :: [float() | non_finite()]
  def unpack(binary, :float32), do: unpack32(binary)
  def unpack(binary, :float64), do: unpack64(binary)
  def unpack(binary, :float16), do: unpack16(binary)

  # bfloat16 is the upper half of a float32.
  def unpack(binary, :bfloat16),
    do: unpack32(for <<half::binary-2 <- binary>>, into: <<>>, do: <<0::16, half::binary>>)

  for {unpack, bits, exponent, fraction} <- [
        {:unpack64, 64, 11, 52},
        {:unpack32, 32, 8, 23},
        {:unpack16, 16, 5, 10}
      ] do
    defp unquote(unpack)(
           <<a::float-little-unquote(bits), b::float-little-unquote(bits),
             c::float-little-unquote(bits), d::float-little-unquote(bits), rest::binary>>
         ),
         do: [a, b, c, d | unquote(unpack)(rest)]

    defp unquote(unpack)(<<a::float-little-unquote(bits), rest::binary>>),
      do: [a | unquote(unpack)(rest)]

    defp unquote(unpack)(<<word::little-unquote(bits), rest::binary>>) do
      <<sign::1, _::unquote(exponent), fraction::unquote(fraction)>> = <<word::unquote(bits)>>
      [non_finite(sign, fraction) | unquote(unpack)(rest)]
    end

    defp unquote(unpack)(<<>>), do: []
  end

  defp non_finite(0, 0), do: :infinity
  defp non_finite(1, 0), do: :neg_infinity
  defp non_finite(_sign, _fraction), do: :nan

  @doc "The float32 bytes of the negated values: weights from a gradient."
  @spec negate(binary(), dtype()) :: {:ok, binary()} | {:error, String.t()}
  def negate(binary, dtype) do
    binary |> unpack(dtype) |> Enum.map(&(-&1)) |> pack(:float32)
  rescue
    ArithmeticError -> {:error, "is not finite"}
  end
end
