defmodule Tinkex.CustomLoss.MessagePack do
  @moduledoc """
  A complete [MessagePack](https://github.com/msgpack/msgpack/blob/master/spec.md) codec.

  | Elixir | MessagePack | back in Elixir |
  |---|---|---|
  | `nil`, `true`, `false` | nil, bool | the same |
  | integer, -2^63 to 2^64 - 1 | shortest int | integer |
  | float; `:nan`, `:infinity`, `:neg_infinity` | float 64 | the same (float 32 is read, too) |
  | `String.t()` | str | binary, a copy |
  | `{:bin, iodata}` | bin | binary, a part of the frame |
  | list | array | list |
  | map with string or atom keys | map, keys ascending | map with string keys |
  | `Tinkex.CustomLoss.MessagePack.Ext` | ext | the same |
  | `Tinkex.CustomLoss.MessagePack.Timestamp` | ext -1 | the same |

  Encoding yields the canonical form of docs/protocol.md: equal terms give equal bytes. The result
  is iodata that refers to the payload of a `{:bin, iodata}`; nothing large is copied.

  Decoding makes no atom from the wire, nests at most #{64} deep, and checks every declared length
  against the bytes that are left before it builds anything. A bin is a part of the frame and keeps
  the whole frame alive; strings are copied out, so that keeping a metric's name does not.

  What only one side of a wire could mean is refused by both directions: a str that is not UTF-8
  (bytes belong in a bin), and a map that repeats a key. Atoms are written as strings where they
  are keys, whichever they are; as values, only the six of the table are.
  """

  import Bitwise

  defmodule Ext do
    @moduledoc "An extension value: an application's `type` (-128 to 127) and its bytes."
    @enforce_keys [:type, :data]
    defstruct [:type, :data]
    @type t :: %__MODULE__{type: -128..127, data: binary()}
  end

  defmodule Timestamp do
    @moduledoc "The predefined extension -1: seconds since 1970-01-01T00:00:00Z, and nanoseconds."
    @enforce_keys [:seconds]
    defstruct [:seconds, nanoseconds: 0]
    @type t :: %__MODULE__{seconds: integer(), nanoseconds: 0..999_999_999}
  end

  defmodule DecodeError do
    @moduledoc "A frame that is not one MessagePack value. `offset` is the byte where it stops being one."
    defexception [:reason, :offset]
    @type t :: %__MODULE__{reason: String.t(), offset: non_neg_integer()}

    @impl true
    def message(%{reason: reason, offset: offset}),
      do: "not MessagePack: #{reason} (at byte #{offset})"
  end

  @max_depth 64
  @max_length 0xFFFFFFFF

  @type key :: String.t() | atom()
  @type encodable ::
          nil
          | boolean()
          | number()
          | :nan
          | :infinity
          | :neg_infinity
          | String.t()
          | {:bin, iodata()}
          | [encodable()]
          | %{key() => encodable()}
          | Ext.t()
          | Timestamp.t()

  @doc """
  Encodes a term in canonical form.

  Raises `ArgumentError` with the path to whatever MessagePack, or this codec, has no form for.

      iex> IO.iodata_to_binary(Tinkex.CustomLoss.MessagePack.encode(%{ok: [1, -1, "é"]}))
      <<0x81, 0xA2, "ok", 0x93, 1, 0xFF, 0xA2, "é">>
  """
  @spec encode(encodable()) :: iodata()
  def encode(term), do: [pack(term, [], 0)]

  # Bytes stay integers: an iolist holds them as they are.
  defp pack(term, path, _depth) when is_binary(term) do
    if utf8?(term), do: [str_header(byte_size(term), path) | term], else: not_utf8!(path)
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

  @spec not_utf8!([key() | non_neg_integer()]) :: no_return()
  defp not_utf8!(path),
    do: refuse!("is a string that is not UTF-8; send bytes as {:bin, bytes}", path)

  defp too_long!(n, unit, path),
    do: refuse!("has #{n} #{unit}; MessagePack holds at most #{@max_length}", path)

  @spec refuse!(String.t(), [key() | non_neg_integer()]) :: no_return()
  defp refuse!(sentence, []), do: raise(ArgumentError, "cannot encode: the term #{sentence}")

  defp refuse!(sentence, path),
    do: raise(ArgumentError, "cannot encode: the value at `#{format_path(path)}` #{sentence}")

  @doc false
  # A path is kept innermost first: ["weight", 1, "regularizers"] is `regularizers[1].weight`.
  @spec format_path([key() | non_neg_integer()]) :: String.t()
  def format_path(path) do
    path
    |> Enum.reverse()
    |> Enum.map_join(fn
      index when is_integer(index) -> "[#{index}]"
      key -> ".#{key}"
    end)
    |> String.trim_leading(".")
  end

  @doc """
  Decodes a frame that holds exactly one value.

      iex> Tinkex.CustomLoss.MessagePack.decode(<<0x92, 1, 0xCB, 0x7FF0000000000000::64>>)
      {:ok, [1, :infinity]}

      iex> {:error, error} = Tinkex.CustomLoss.MessagePack.decode(<<0x92, 1>>)
      iex> Exception.message(error)
      "not MessagePack: an array of 2 items, but only 1 bytes are left (at byte 1)"
  """
  @spec decode(binary()) :: {:ok, term()} | {:error, DecodeError.t()}
  def decode(frame) when is_binary(frame) do
    case unpack(frame, [], 0) do
      {:ok, _term} = ok ->
        ok

      {:error, reason, rest} ->
        {:error, %DecodeError{reason: reason, offset: byte_size(frame) - byte_size(rest)}}
    end
  end

  # `open` is the stack of containers that still wait for values, `depth` its height. Every call is
  # a tail call that hands on the rest of the frame. The functions below write it <<rest::binary>>
  # where a variable would do: it is what lets the compiler keep one match context throughout
  # instead of a new sub-binary for each value, which is a third of the time.
  defp unpack(<<byte, rest::binary>>, open, depth) when byte <= 0x7F,
    do: close(rest, byte, open, depth)

  defp unpack(<<byte, rest::binary>>, open, depth) when byte <= 0x8F,
    do: open_map(rest, byte - 0x80, open, depth)

  defp unpack(<<byte, rest::binary>>, open, depth) when byte <= 0x9F,
    do: open_array(rest, byte - 0x90, open, depth)

  defp unpack(<<0b101::3, n::5, text::binary-size(n), rest::binary>>, open, depth),
    do: close_text(rest, text, open, depth)

  defp unpack(<<byte, rest::binary>>, open, depth) when byte >= 0xE0,
    do: close(rest, byte - 0x100, open, depth)

  defp unpack(<<0xCB, float::float, rest::binary>>, open, depth),
    do: close(rest, float, open, depth)

  defp unpack(<<0xCB, sign::1, 0x7FF::11, fraction::52, rest::binary>>, open, depth),
    do: close(rest, non_finite(sign, fraction), open, depth)

  defp unpack(<<0xCA, float::float-32, rest::binary>>, open, depth),
    do: close(rest, float, open, depth)

  defp unpack(<<0xCA, sign::1, 0xFF, fraction::23, rest::binary>>, open, depth),
    do: close(rest, non_finite(sign, fraction), open, depth)

  defp unpack(<<0xD9, n, text::binary-size(n), rest::binary>>, open, depth),
    do: close_text(rest, text, open, depth)

  defp unpack(<<0xDA, n::16, text::binary-size(n), rest::binary>>, open, depth),
    do: close_text(rest, text, open, depth)

  defp unpack(<<0xDB, n::32, text::binary-size(n), rest::binary>>, open, depth),
    do: close_text(rest, text, open, depth)

  defp unpack(<<0xC0, rest::binary>>, open, depth), do: close(rest, nil, open, depth)
  defp unpack(<<0xC2, rest::binary>>, open, depth), do: close(rest, false, open, depth)
  defp unpack(<<0xC3, rest::binary>>, open, depth), do: close(rest, true, open, depth)
  defp unpack(<<0xCC, n, rest::binary>>, open, depth), do: close(rest, n, open, depth)
  defp unpack(<<0xCD, n::16, rest::binary>>, open, depth), do: close(rest, n, open, depth)
  defp unpack(<<0xCE, n::32, rest::binary>>, open, depth), do: close(rest, n, open, depth)
  defp unpack(<<0xCF, n::64, rest::binary>>, open, depth), do: close(rest, n, open, depth)
  defp unpack(<<0xD0, n::signed, rest::binary>>, open, depth), do: close(rest, n, open, depth)
  defp unpack(<<0xD1, n::16-signed, rest::binary>>, open, depth), do: close(rest, n, open, depth)
  defp unpack(<<0xD2, n::32-signed, rest::binary>>, open, depth), do: close(rest, n, open, depth)
  defp unpack(<<0xD3, n::64-signed, rest::binary>>, open, depth), do: close(rest, n, open, depth)

  defp unpack(<<0xC4, n, bin::binary-size(n), rest::binary>>, open, depth),
    do: close(rest, bin, open, depth)

  defp unpack(<<0xC5, n::16, bin::binary-size(n), rest::binary>>, open, depth),
    do: close(rest, bin, open, depth)

  defp unpack(<<0xC6, n::32, bin::binary-size(n), rest::binary>>, open, depth),
    do: close(rest, bin, open, depth)

  defp unpack(<<0xDC, n::16, rest::binary>>, open, depth), do: open_array(rest, n, open, depth)
  defp unpack(<<0xDD, n::32, rest::binary>>, open, depth), do: open_array(rest, n, open, depth)
  defp unpack(<<0xDE, n::16, rest::binary>>, open, depth), do: open_map(rest, n, open, depth)
  defp unpack(<<0xDF, n::32, rest::binary>>, open, depth), do: open_map(rest, n, open, depth)

  defp unpack(<<0xD4, type::signed, data::binary-1, rest::binary>>, open, depth),
    do: close_ext(rest, type, data, open, depth)

  defp unpack(<<0xD5, type::signed, data::binary-2, rest::binary>>, open, depth),
    do: close_ext(rest, type, data, open, depth)

  defp unpack(<<0xD6, type::signed, data::binary-4, rest::binary>>, open, depth),
    do: close_ext(rest, type, data, open, depth)

  defp unpack(<<0xD7, type::signed, data::binary-8, rest::binary>>, open, depth),
    do: close_ext(rest, type, data, open, depth)

  defp unpack(<<0xD8, type::signed, data::binary-16, rest::binary>>, open, depth),
    do: close_ext(rest, type, data, open, depth)

  defp unpack(<<0xC7, n, type::signed, data::binary-size(n), rest::binary>>, open, depth),
    do: close_ext(rest, type, data, open, depth)

  defp unpack(<<0xC8, n::16, type::signed, data::binary-size(n), rest::binary>>, open, depth),
    do: close_ext(rest, type, data, open, depth)

  defp unpack(<<0xC9, n::32, type::signed, data::binary-size(n), rest::binary>>, open, depth),
    do: close_ext(rest, type, data, open, depth)

  defp unpack(<<0xC1, _::binary>> = rest, _open, _depth),
    do: {:error, "the byte 0xC1 begins no value", rest}

  defp unpack(rest, _open, _depth),
    do: {:error, "the frame ends in the middle of a value", rest}

  defp open_array(<<rest::binary>>, n, _open, _depth) when n > byte_size(rest),
    do: {:error, "an array of #{n} items, but only #{byte_size(rest)} bytes are left", rest}

  defp open_array(<<rest::binary>>, _n, _open, @max_depth), do: too_deep(rest)
  defp open_array(<<rest::binary>>, 0, open, depth), do: close(rest, [], open, depth)
  defp open_array(<<rest::binary>>, n, open, depth), do: unpack(rest, [{n, []} | open], depth + 1)

  # An entry is two bytes at least.
  defp open_map(<<rest::binary>>, n, _open, _depth) when 2 * n > byte_size(rest),
    do: {:error, "a map of #{n} entries, but only #{byte_size(rest)} bytes are left", rest}

  defp open_map(<<rest::binary>>, _n, _open, @max_depth), do: too_deep(rest)
  defp open_map(<<rest::binary>>, 0, open, depth), do: close(rest, %{}, open, depth)

  defp open_map(<<rest::binary>>, n, open, depth),
    do: unpack(rest, [{:key, n, []} | open], depth + 1)

  # A value is complete: give it to the innermost open container.
  defp close(<<rest::binary>>, key, [{:key, n, entries} | open], depth),
    do: unpack(rest, [{:value, key, n, entries} | open], depth)

  defp close(<<rest::binary>>, value, [{:value, key, 1, entries} | open], depth),
    do: close_map(rest, [{key, value} | entries], open, depth)

  defp close(<<rest::binary>>, value, [{:value, key, n, entries} | open], depth),
    do: unpack(rest, [{:key, n - 1, [{key, value} | entries]} | open], depth)

  defp close(<<rest::binary>>, value, [{1, items} | open], depth),
    do: close(rest, :lists.reverse(items, [value]), open, depth - 1)

  defp close(<<rest::binary>>, value, [{n, items} | open], depth),
    do: unpack(rest, [{n - 1, [value | items]} | open], depth)

  defp close(<<>>, value, [], 0), do: {:ok, value}

  defp close(<<rest::binary>>, _value, [], 0),
    do: {:error, "#{byte_size(rest)} bytes follow the value", rest}

  defp close_map(<<rest::binary>>, entries, open, depth) do
    map = :maps.from_list(entries)

    if map_size(map) == length(entries),
      do: close(rest, map, open, depth - 1),
      else: {:error, "a map repeats a key", rest}
  end

  defp close_text(<<rest::binary>>, text, open, depth) do
    if utf8?(text),
      do: close(rest, :binary.copy(text), open, depth),
      else: {:error, "a str is not UTF-8", rest}
  end

  defp close_ext(<<rest::binary>>, -1, <<seconds::32>>, open, depth),
    do: close(rest, %Timestamp{seconds: seconds}, open, depth)

  defp close_ext(<<rest::binary>>, -1, <<nanoseconds::30, seconds::34>>, open, depth)
       when nanoseconds <= 999_999_999,
       do: close(rest, %Timestamp{seconds: seconds, nanoseconds: nanoseconds}, open, depth)

  defp close_ext(<<rest::binary>>, -1, <<nanoseconds::32, seconds::64-signed>>, open, depth)
       when nanoseconds <= 999_999_999,
       do: close(rest, %Timestamp{seconds: seconds, nanoseconds: nanoseconds}, open, depth)

  defp close_ext(<<rest::binary>>, -1, _data, _open, _depth),
    do: {:error, "an ext of type -1 is not a timestamp", rest}

  defp close_ext(<<rest::binary>>, type, data, open, depth),
    do: close(rest, %Ext{type: type, data: data}, open, depth)

  defp too_deep(rest), do: {:error, "values nest deeper than #{@max_depth} levels", rest}

  defp non_finite(0, 0), do: :infinity
  defp non_finite(1, 0), do: :neg_infinity
  defp non_finite(_sign, _fraction), do: :nan

  # String.valid?/1 looks at one character at a time; seven ASCII ones fit a small integer.
  defp utf8?(<<seven::56, rest::binary>>) when (seven &&& 0x80808080808080) == 0, do: utf8?(rest)
  defp utf8?(<<_::utf8, rest::binary>>), do: utf8?(rest)
  defp utf8?(<<>>), do: true
  defp utf8?(_), do: false
end
