defmodule Tinkex.CustomLoss.Test.Terms do
  @moduledoc "Random terms that MessagePack has a form for, from a seeded generator."

  alias Tinkex.CustomLoss.Wire.MessagePack.{Ext, Timestamp}

  @doc "Makes what follows in this process the same in every run of that seed."
  def seed(seed), do: :rand.seed(:exsss, seed)

  @doc "A term of at most `depth` levels."
  def term(0), do: scalar()

  def term(depth) do
    case pick(4) do
      1 -> many(fn -> term(depth - 1) end)
      2 -> fn -> {string(), term(depth - 1)} end |> many() |> Map.new()
      _ -> scalar()
    end
  end

  defp scalar do
    case pick(8) do
      1 -> Enum.random([nil, true, false, :nan, :infinity, :neg_infinity])
      2 -> integer()
      3 -> float()
      4 -> string()
      5 -> {:bin, bytes(pick(300))}
      6 -> %Ext{type: pick(128) - 1, data: bytes(pick(20) - 1)}
      7 -> %Timestamp{seconds: integer(63), nanoseconds: pick(1_000_000_000) - 1}
      8 -> pick(100) - 50
    end
  end

  # Lengths of integers and strings are spread over all headers.
  defp integer(bits \\ 64) do
    <<n::size(bits)>> = <<-1::size(bits)>>
    n = :rand.uniform(Bitwise.bsr(n, pick(bits) - 1)) - 1
    if pick(2) == 1 and n < Bitwise.bsl(1, 63), do: -n, else: n
  end

  defp float do
    case bytes(8) do
      <<float::float>> -> float
      _ -> :rand.normal()
    end
  end

  defp string do
    length = Enum.random([0, 1, 5, 31, 32, 40, 255, 256, 300])
    characters = Enum.random([~c"abc_", ~c"é λ", ~c"漢字🙂x"])
    for _ <- 1..length//1, into: "", do: <<Enum.random(characters)::utf8>>
  end

  defp many(fun), do: for(_ <- 1..(pick(18) - 1)//1, do: fun.())
  defp bytes(n), do: :rand.bytes(n)
  defp pick(n), do: :rand.uniform(n)
end
