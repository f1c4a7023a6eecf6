defmodule Tinkex.CustomLoss.Test.JSON do
  @moduledoc "A reader of JSON for the vectors: Elixir has none before 1.18."

  @doc "The value of a JSON text: maps with string keys, integers exact, nil for null."
  def decode!(text) do
    {value, rest} = value(skip(text))
    "" = skip(rest)
    value
  end

  defp value("{" <> rest), do: members(skip(rest), %{})
  defp value("[" <> rest), do: items(skip(rest), [])
  defp value("\"" <> rest), do: string(rest, [])
  defp value("null" <> rest), do: {nil, rest}
  defp value("true" <> rest), do: {true, rest}
  defp value("false" <> rest), do: {false, rest}

  defp value(text) do
    [number] = Regex.run(~r/^-?\d+(\.\d+)?([eE][-+]?\d+)?/, text, capture: :first)
    rest = binary_part(text, byte_size(number), byte_size(text) - byte_size(number))

    cond do
      not String.contains?(number, [".", "e", "E"]) -> {String.to_integer(number), rest}
      # Erlang wants a fraction before an exponent.
      String.contains?(number, ".") -> {String.to_float(number), rest}
      true -> {number |> String.replace(~r/[eE]/, ".0e") |> String.to_float(), rest}
    end
  end

  defp members("}" <> rest, map), do: {map, rest}
  defp members("," <> rest, map), do: members(skip(rest), map)

  defp members("\"" <> rest, map) do
    {key, rest} = string(rest, [])
    ":" <> rest = skip(rest)
    {value, rest} = value(skip(rest))
    members(skip(rest), Map.put(map, key, value))
  end

  defp items("]" <> rest, items), do: {Enum.reverse(items), rest}
  defp items("," <> rest, items), do: items(skip(rest), items)

  defp items(text, items) do
    {value, rest} = value(text)
    items(skip(rest), [value | items])
  end

  defp string("\"" <> rest, parts), do: {parts |> Enum.reverse() |> IO.iodata_to_binary(), rest}

  # Characters beyond the basic plane stand in the files as they are, so there are no surrogates.
  defp string("\\u" <> <<hex::binary-4, rest::binary>>, parts),
    do: string(rest, [<<String.to_integer(hex, 16)::utf8>> | parts])

  for {escape, char} <- [{?n, "\n"}, {?t, "\t"}, {?r, "\r"}, {?b, "\b"}, {?f, "\f"}] do
    defp string(<<?\\, unquote(escape), rest::binary>>, parts),
      do: string(rest, [unquote(char) | parts])
  end

  defp string(<<?\\, char, rest::binary>>, parts), do: string(rest, [char | parts])
  defp string(<<char, rest::binary>>, parts), do: string(rest, [char | parts])

  defp skip(<<space, rest::binary>>) when space in ~c" \n\r\t", do: skip(rest)
  defp skip(text), do: text
end
