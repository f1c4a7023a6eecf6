defmodule Tinkex.CustomLoss.Wire.MessagePack.Decoder do
  @moduledoc false

  import Bitwise

  alias Tinkex.CustomLoss.Wire.MessagePack.{Ext, Timestamp}

  @max_depth 64
  @max_values 1_048_576

  @doc "Most levels of arrays and maps, the outermost included."
  @spec max_depth() :: pos_integer()
  def max_depth, do: @max_depth

  @doc "Most values of a frame, keys included: a byte of MessagePack can claim 16 of memory."
  @spec max_values() :: pos_integer()
  def max_values, do: @max_values

  @doc "The one value of a frame, or what is wrong with it and the bytes from there on."
  @spec decode(binary()) :: {:ok, term()} | {:error, String.t(), binary()}
  def decode(frame), do: value(frame, [], @max_values)

  # `open` is the stack of containers that still wait for values, `left` how many values a frame may
  # still hold. Every call is a tail call that hands on the rest of the frame. The functions below
  # write it <<rest::binary>> where a variable would do: it is what lets the compiler keep one match
  # context throughout instead of a new sub-binary for each value, which is a third of the time.

  defp value(<<n, rest::binary>>, open, left) when n <= 0x7F,
    do: give(rest, n, open, left)

  defp value(<<tag, rest::binary>>, open, left) when tag <= 0x8F,
    do: map(rest, tag - 0x80, open, left)

  defp value(<<tag, rest::binary>>, open, left) when tag <= 0x9F,
    do: array(rest, tag - 0x90, open, left)

  defp value(<<0b101::3, n::5, text::binary-size(n), rest::binary>>, open, left),
    do: text(rest, text, open, left)

  defp value(<<tag, rest::binary>>, open, left) when tag >= 0xE0,
    do: give(rest, tag - 0x100, open, left)

  defp value(<<0xCB, float::float, rest::binary>>, open, left),
    do: give(rest, float, open, left)

  # The BEAM has no float for these, so the clause above does not match them.
  defp value(<<0xCB, sign::1, 0x7FF::11, fraction::52, rest::binary>>, open, left),
    do: give(rest, non_finite(sign, fraction), open, left)

  defp value(<<0xCA, float::float-32, rest::binary>>, open, left),
    do: give(rest, float, open, left)

  defp value(<<0xCA, sign::1, 0xFF, fraction::23, rest::binary>>, open, left),
    do: give(rest, non_finite(sign, fraction), open, left)

  defp value(<<0xD9, n, text::binary-size(n), rest::binary>>, open, left),
    do: text(rest, text, open, left)

  defp value(<<0xDA, n::16, text::binary-size(n), rest::binary>>, open, left),
    do: text(rest, text, open, left)

  defp value(<<0xDB, n::32, text::binary-size(n), rest::binary>>, open, left),
    do: text(rest, text, open, left)

  defp value(<<0xC0, rest::binary>>, open, left), do: give(rest, nil, open, left)
  defp value(<<0xC2, rest::binary>>, open, left), do: give(rest, false, open, left)
  defp value(<<0xC3, rest::binary>>, open, left), do: give(rest, true, open, left)
  defp value(<<0xCC, n, rest::binary>>, open, left), do: give(rest, n, open, left)
  defp value(<<0xCD, n::16, rest::binary>>, open, left), do: give(rest, n, open, left)
  defp value(<<0xCE, n::32, rest::binary>>, open, left), do: give(rest, n, open, left)
  defp value(<<0xCF, n::64, rest::binary>>, open, left), do: give(rest, n, open, left)
  defp value(<<0xD0, n::signed, rest::binary>>, open, left), do: give(rest, n, open, left)
  defp value(<<0xD1, n::16-signed, rest::binary>>, open, left), do: give(rest, n, open, left)
  defp value(<<0xD2, n::32-signed, rest::binary>>, open, left), do: give(rest, n, open, left)
  defp value(<<0xD3, n::64-signed, rest::binary>>, open, left), do: give(rest, n, open, left)

  defp value(<<0xC4, n, bin::binary-size(n), rest::binary>>, open, left),
    do: give(rest, bin, open, left)

  defp value(<<0xC5, n::16, bin::binary-size(n), rest::binary>>, open, left),
    do: give(rest, bin, open, left)

  defp value(<<0xC6, n::32, bin::binary-size(n), rest::binary>>, open, left),
    do: give(rest, bin, open, left)

  defp value(<<0xDC, n::16, rest::binary>>, open, left), do: array(rest, n, open, left)
  defp value(<<0xDD, n::32, rest::binary>>, open, left), do: array(rest, n, open, left)
  defp value(<<0xDE, n::16, rest::binary>>, open, left), do: map(rest, n, open, left)
  defp value(<<0xDF, n::32, rest::binary>>, open, left), do: map(rest, n, open, left)

  for {tag, n} <- [{0xD4, 1}, {0xD5, 2}, {0xD6, 4}, {0xD7, 8}, {0xD8, 16}] do
    defp value(<<unquote(tag), type::signed, data::binary-unquote(n), rest::binary>>, open, left),
      do: ext(rest, type, data, open, left)
  end

  defp value(<<0xC7, n, type::signed, data::binary-size(n), rest::binary>>, open, left),
    do: ext(rest, type, data, open, left)

  defp value(<<0xC8, n::16, type::signed, data::binary-size(n), rest::binary>>, open, left),
    do: ext(rest, type, data, open, left)

  defp value(<<0xC9, n::32, type::signed, data::binary-size(n), rest::binary>>, open, left),
    do: ext(rest, type, data, open, left)

  defp value(<<0xC1, _::binary>> = rest, _open, _left),
    do: {:error, "the byte 0xC1 begins no value", rest}

  defp value(rest, _open, _left),
    do: {:error, "the frame ends in the middle of a value", rest}

  # A container is refused on its declared size before anything is built. An item of an array is one
  # byte at least, an entry of a map two.

  defp array(<<rest::binary>>, n, _open, _left) when n > byte_size(rest),
    do: {:error, "an array of #{n} items, but bytes left: #{byte_size(rest)}", rest}

  defp array(<<rest::binary>>, n, _open, left) when n > left, do: too_many(rest)

  defp array(<<rest::binary>>, _n, open, _left) when length(open) >= @max_depth,
    do: too_deep(rest)

  defp array(<<rest::binary>>, 0, open, left), do: give(rest, [], open, left)
  defp array(<<rest::binary>>, n, open, left), do: value(rest, [{n, []} | open], left - n)

  defp map(<<rest::binary>>, n, _open, _left) when 2 * n > byte_size(rest),
    do: {:error, "a map of #{n} entries, but bytes left: #{byte_size(rest)}", rest}

  defp map(<<rest::binary>>, n, _open, left) when 2 * n > left, do: too_many(rest)
  defp map(<<rest::binary>>, _n, open, _left) when length(open) >= @max_depth, do: too_deep(rest)
  defp map(<<rest::binary>>, 0, open, left), do: give(rest, %{}, open, left)
  defp map(<<rest::binary>>, n, open, left), do: key(rest, n, [], open, left - 2 * n)

  defp key(<<rest::binary>>, 0, entries, open, left) do
    map = :maps.from_list(entries)

    if map_size(map) == length(entries),
      do: give(rest, map, open, left),
      else: {:error, "a map repeats a key", rest}
  end

  defp key(<<rest::binary>>, n, entries, open, left),
    do: value(rest, [{:key, n, entries} | open], left)

  # Copied: a bin may keep the frame alive, the name of a metric must not.
  defp text(<<rest::binary>>, text, open, left) do
    if utf8?(text),
      do: string(rest, :binary.copy(text), open, left),
      else: {:error, "a str is not UTF-8", rest}
  end

  defp string(<<rest::binary>>, string, [{:key, n, entries} | open], left),
    do: value(rest, [{:entry, string, n, entries} | open], left)

  defp string(<<rest::binary>>, string, open, left), do: give(rest, string, open, left)

  # A value is complete: the innermost open container takes it.

  defp give(<<rest::binary>>, value, [{:entry, key, n, entries} | open], left),
    do: key(rest, n - 1, [{key, value} | entries], open, left)

  defp give(<<rest::binary>>, value, [{1, items} | open], left),
    do: give(rest, :lists.reverse(items, [value]), open, left)

  defp give(<<rest::binary>>, value, [{n, items} | open], left),
    do: value(rest, [{n - 1, [value | items]} | open], left)

  defp give(<<rest::binary>>, _value, [{:key, _n, _entries} | _open], _left),
    do: {:error, "a key of a map is not a str", rest}

  defp give(<<>>, value, [], _left), do: {:ok, value}

  defp give(<<rest::binary>>, _value, [], _left),
    do: {:error, "the frame goes on after the value", rest}

  defp ext(<<rest::binary>>, -1, <<seconds::32>>, open, left),
    do: give(rest, %Timestamp{seconds: seconds}, open, left)

  defp ext(<<rest::binary>>, -1, <<nanoseconds::30, seconds::34>>, open, left)
       when nanoseconds <= 999_999_999,
       do: give(rest, %Timestamp{seconds: seconds, nanoseconds: nanoseconds}, open, left)

  defp ext(<<rest::binary>>, -1, <<nanoseconds::32, seconds::64-signed>>, open, left)
       when nanoseconds <= 999_999_999,
       do: give(rest, %Timestamp{seconds: seconds, nanoseconds: nanoseconds}, open, left)

  defp ext(<<rest::binary>>, -1, _data, _open, _left),
    do: {:error, "an ext of type -1 is not a timestamp", rest}

  defp ext(<<rest::binary>>, type, data, open, left),
    do: give(rest, %Ext{type: type, data: data}, open, left)

  defp too_deep(rest), do: {:error, "values nest deeper than #{@max_depth} levels", rest}
  defp too_many(rest), do: {:error, "there are more than #{@max_values} values", rest}

  defp non_finite(0, 0), do: :infinity
  defp non_finite(1, 0), do: :neg_infinity
  defp non_finite(_sign, _fraction), do: :nan

  @doc "Whether a binary is text."
  # String.valid?/1 looks at one character at a time; seven ASCII ones fit a small integer.
  @spec utf8?(binary()) :: boolean()
  def utf8?(<<seven::56, rest::binary>>) when (seven &&& 0x80808080808080) == 0, do: utf8?(rest)
  def utf8?(<<_::utf8, rest::binary>>), do: utf8?(rest)
  def utf8?(<<>>), do: true
  def utf8?(_), do: false
end
