defmodule Tinkex.CustomLoss.Wire.MessagePack.Encoder do
  @moduledoc false

  alias Tinkex.CustomLoss.Wire.MessagePack
  alias Tinkex.CustomLoss.Wire.MessagePack.{Decoder, Ext, Timestamp}

  # What a reader refuses is refused here, since the one who wrote too much should hear of it.
  @max_depth Decoder.max_depth()
  @max_values Decoder.max_values()
  @max_length 0xFFFFFFFF

  @doc "The canonical form, as iodata; raises `ArgumentError`."
  @spec encode(MessagePack.encodable()) :: iodata()
  def encode(term) do
    if count(term, @max_values) < 0,
      do: refuse!("holds more than #{@max_values} values; send numbers as a tensor", [])

    [pack(term, [], 0)]
  end

  # How many more values there may be after those of a term.
  defp count([item | rest], left) when left >= 0, do: count(rest, count(item, left - 1))

  defp count(map, left) when is_map(map) and not is_struct(map) and left >= 0,
    do: :maps.fold(fn _key, value, left -> count(value, left - 2) end, left, map)

  defp count(_term, left), do: left

  # Bytes stay integers: an iolist holds them as they are.
  defp pack(term, path, _depth) when is_binary(term) do
    if Decoder.utf8?(term),
      do: [str_header(byte_size(term), path) | term],
      else: refuse!("is a string that is not UTF-8; send bytes as {:bin, bytes}", path)
  end

  defp pack(int, path, _depth) when is_integer(int), do: pack_integer(int, path)
  defp pack(float, _path, _depth) when is_float(float), do: <<0xCB, float::float>>
  defp pack(nil, _path, _depth), do: 0xC0
  defp pack(false, _path, _depth), do: 0xC2
  defp pack(true, _path, _depth), do: 0xC3
  defp pack(:nan, _path, _depth), do: <<0xCB, 0x7FF8000000000000::64>>
  defp pack(:infinity, _path, _depth), do: <<0xCB, 0x7FF0000000000000::64>>
  defp pack(:neg_infinity, _path, _depth), do: <<0xCB, 0xFFF0000000000000::64>>

  defp pack(term, path, @max_depth) when is_list(term) or (is_map(term) and term != %{}),
    do: refuse!("nests deeper than #{@max_depth} levels", path)

  defp pack(list, path, depth) when is_list(list) do
    case list_length(list) do
      nil -> refuse!("is an improper list", path)
      n -> [array_header(n, path) | pack_items(list, 0, path, depth + 1)]
    end
  end

  defp pack({:bin, data}, path, _depth) do
    case bin_size(data) do
      nil -> refuse!("is {:bin, data} whose data is not iodata", path)
      n -> [bin_header(n, path), data]
    end
  end

  defp pack(%Ext{} = ext, path, _depth), do: pack_ext(ext, path)
  defp pack(%Timestamp{} = timestamp, path, _depth), do: pack_timestamp(timestamp, path)

  defp pack(%module{}, path, _depth),
    do: refuse!("is a struct %#{inspect(module)}{}, which MessagePack has no form for", path)

  defp pack(map, path, depth) when is_map(map) do
    entries = for {key, value} <- map, do: {key(key, path), value}

    [
      map_header(map_size(map), path)
      | pack_entries(:lists.keysort(1, entries), path, depth + 1)
    ]
  end

  defp pack(atom, path, _depth) when is_atom(atom) do
    refuse!("is the atom #{inspect(atom)}; as a value, write the string \"#{atom}\"", path)
  end

  defp pack(term, path, _depth) do
    shown = inspect(term, limit: 5, printable_limit: 40)
    refuse!("is #{shown}, which MessagePack has no form for", path)
  end

  defp pack_items([item | rest], index, path, depth),
    do: [pack(item, [index | path], depth) | pack_items(rest, index + 1, path, depth)]

  defp pack_items([], _index, _path, _depth), do: []

  defp pack_entries([{key, _}, {key, _} | _], path, _depth),
    do: refuse!("has the key \"#{key}\" twice, as a string and as an atom", path)

  defp pack_entries([{key, value} | rest], path, depth) do
    inner = [key | path]
    [pack(key, inner, depth), pack(value, inner, depth) | pack_entries(rest, path, depth)]
  end

  defp pack_entries([], _path, _depth), do: []

  defp key(key, _path) when is_binary(key), do: key
  defp key(key, _path) when is_atom(key), do: Atom.to_string(key)

  defp key(key, path) do
    shown = inspect(key, limit: 5, printable_limit: 40)
    refuse!("has the key #{shown}; keys are strings or atoms", path)
  end

  defp pack_integer(int, _path) when int in 0..0x7F, do: int
  defp pack_integer(int, _path) when int in -0x20..-1, do: 0x100 + int
  defp pack_integer(int, _path) when int in 0..0xFF, do: <<0xCC, int>>
  defp pack_integer(int, _path) when int in 0..0xFFFF, do: <<0xCD, int::16>>
  defp pack_integer(int, _path) when int in 0..0xFFFFFFFF, do: <<0xCE, int::32>>
  defp pack_integer(int, _path) when int in 0..0xFFFFFFFFFFFFFFFF, do: <<0xCF, int::64>>
  defp pack_integer(int, _path) when int in -0x80..-1, do: <<0xD0, int>>
  defp pack_integer(int, _path) when int in -0x8000..-1, do: <<0xD1, int::16>>
  defp pack_integer(int, _path) when int in -0x80000000..-1, do: <<0xD2, int::32>>
  defp pack_integer(int, _path) when int in -0x8000000000000000..-1, do: <<0xD3, int::64>>

  defp pack_integer(_int, path),
    do: refuse!("is an integer outside -2^63 to 2^64 - 1", path)

  defp str_header(n, _path) when n < 32, do: 0xA0 + n
  defp str_header(n, _path) when n <= 0xFF, do: <<0xD9, n>>
  defp str_header(n, _path) when n <= 0xFFFF, do: <<0xDA, n::16>>
  defp str_header(n, _path) when n <= @max_length, do: <<0xDB, n::32>>
  defp str_header(n, path), do: too_long!(n, "bytes", path)

  defp bin_header(n, _path) when n <= 0xFF, do: <<0xC4, n>>
  defp bin_header(n, _path) when n <= 0xFFFF, do: <<0xC5, n::16>>
  defp bin_header(n, _path) when n <= @max_length, do: <<0xC6, n::32>>
  defp bin_header(n, path), do: too_long!(n, "bytes", path)

  defp array_header(n, _path) when n < 16, do: 0x90 + n
  defp array_header(n, _path) when n <= 0xFFFF, do: <<0xDC, n::16>>
  defp array_header(n, _path) when n <= @max_length, do: <<0xDD, n::32>>
  defp array_header(n, path), do: too_long!(n, "items", path)

  defp map_header(n, _path) when n < 16, do: 0x80 + n
  defp map_header(n, _path) when n <= 0xFFFF, do: <<0xDE, n::16>>
  defp map_header(n, _path) when n <= @max_length, do: <<0xDF, n::32>>
  defp map_header(n, path), do: too_long!(n, "entries", path)

  defp pack_ext(%Ext{type: type, data: data}, path)
       when type in -128..127 and is_binary(data) do
    case byte_size(data) do
      1 -> [<<0xD4, type>>, data]
      2 -> [<<0xD5, type>>, data]
      4 -> [<<0xD6, type>>, data]
      8 -> [<<0xD7, type>>, data]
      16 -> [<<0xD8, type>>, data]
      n when n <= 0xFF -> [<<0xC7, n, type>>, data]
      n when n <= 0xFFFF -> [<<0xC8, n::16, type>>, data]
      n when n <= @max_length -> [<<0xC9, n::32, type>>, data]
      n -> too_long!(n, "bytes", path)
    end
  end

  defp pack_ext(_ext, path),
    do: refuse!("is an Ext whose type is not in -128..127 or whose data is not a binary", path)

  defp pack_timestamp(%Timestamp{seconds: seconds, nanoseconds: nanoseconds}, path)
       when seconds in -0x8000000000000000..0x7FFFFFFFFFFFFFFF and
              nanoseconds in 0..999_999_999 do
    data =
      cond do
        nanoseconds == 0 and seconds in 0..0xFFFFFFFF -> <<seconds::32>>
        seconds in 0..0x3FFFFFFFF -> <<nanoseconds::30, seconds::34>>
        true -> <<nanoseconds::32, seconds::64>>
      end

    pack_ext(%Ext{type: -1, data: data}, path)
  end

  defp pack_timestamp(_timestamp, path),
    do: refuse!("is a Timestamp out of range (64-bit seconds, 0..999_999_999 nanoseconds)", path)

  defp list_length(list) do
    length(list)
  rescue
    ArgumentError -> nil
  end

  defp bin_size(data) when is_binary(data), do: byte_size(data)

  defp bin_size(data) do
    IO.iodata_length(data)
  rescue
    ArgumentError -> nil
  end

  @spec too_long!(non_neg_integer(), String.t(), [String.t() | non_neg_integer()]) :: no_return()
  defp too_long!(n, unit, path),
    do: refuse!("has #{n} #{unit}; MessagePack holds at most #{@max_length}", path)

  @spec refuse!(String.t(), [String.t() | non_neg_integer()]) :: no_return()
  defp refuse!(sentence, path) do
    place = if path == [], do: "the term", else: "the value at `#{MessagePack.format_path(path)}`"
    raise ArgumentError, "cannot encode: #{place} #{sentence}"
  end
end
