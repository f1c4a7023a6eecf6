defmodule Tinkex.CustomLoss.MessagePackTest do
  use ExUnit.Case, async: true

  alias Tinkex.CustomLoss.Wire.MessagePack
  alias Tinkex.CustomLoss.Wire.MessagePack.{DecodeError, Ext, Timestamp}
  alias Tinkex.CustomLoss.Test.{Terms, Vectors}

  doctest MessagePack

  defp frame(term), do: term |> MessagePack.encode() |> IO.iodata_to_binary()

  defp reason(frame) do
    assert {:error, %DecodeError{} = error} = MessagePack.decode(frame)
    Exception.message(error)
  end

  defp refusal(term) do
    assert_raise(ArgumentError, fn -> MessagePack.encode(term) end).message
  end

  describe "encode/1" do
    test "of equal terms gives equal bytes, whatever the keys are" do
      assert frame(%{:b => 1, "a" => 2}) == frame(%{"b" => 1, :a => 2})

      assert frame(%{"aa" => 1, "b" => 2, "" => 3}) ==
               <<0x83, 0xA0, 3, 0xA2, "aa", 1, 0xA1, ?b, 2>>
    end

    test "refers to a large payload and does not copy it" do
      payload = :binary.copy(<<7>>, 16_000_000)
      encoded = MessagePack.encode(%{"data" => {:bin, ["head", payload]}, "id" => 1})

      large = encoded |> binaries() |> Enum.filter(&(byte_size(&1) > 100))
      assert [part] = large
      assert :erts_debug.same(part, payload)
    end

    test "says where a term is that has no form" do
      assert refusal(%{regularizers: [%{}, %{params: %{reduction: :mean}}]}) ==
               "cannot encode: the value at `regularizers[1].params.reduction` is the atom :mean; " <>
                 "as a value, write the string \"mean\""

      assert refusal(self()) =~ "cannot encode: the term is #PID<"
      assert refusal([1, {:a, 1}]) =~ "`[1]` is {:a, 1}, which MessagePack has no form for"
      assert refusal(%{"x" => %Range{first: 1, last: 2, step: 1}}) =~ "`x` is a struct %Range{}"
      assert refusal([1 | 2]) =~ "is an improper list"
      assert refusal(%{{1} => 2}) =~ "has the key {1}; keys are strings or atoms"
      assert refusal(%{"a" => 1, a: 2}) =~ "has the key \"a\" twice, as a string and as an atom"
      assert refusal(<<1::3>>) =~ "which MessagePack has no form for"
    end

    test "refuses what a number or a header cannot hold" do
      assert refusal([0, 2 ** 64]) =~ "`[1]` is an integer outside"
      assert refusal(-(2 ** 63) - 1) =~ "is an integer outside -2^63 to 2^64 - 1"
      assert refusal(%Ext{type: 128, data: ""}) =~ "whose type is not in -128..127"
      assert refusal(%Timestamp{seconds: 0, nanoseconds: 1_000_000_000}) =~ "out of range"
      assert refusal({:bin, :atom}) =~ "whose data is not iodata"

      four_gigabytes = List.duplicate(:binary.copy(<<0>>, 0x1000000), 256)
      assert refusal({:bin, four_gigabytes}) =~ "has 4294967296 bytes; MessagePack holds at most"
    end

    test "refuses bytes that were meant as a bin, before the other side does" do
      assert refusal(%{"data" => <<0, 0, 128, 191>>}) =~
               "`data` is a string that is not UTF-8; send bytes as {:bin, bytes}"
    end

    test "refuses what a reader would refuse for its depth or number of values" do
      nested = fn depth -> Enum.reduce(1..depth, 1, fn _, inner -> [inner] end) end
      assert {:ok, _} = MessagePack.decode(frame(nested.(64)))
      assert refusal(nested.(65)) =~ "nests deeper than 64 levels"
      assert refusal(Enum.reduce(1..65, %{}, fn _, inner -> %{"a" => inner} end)) =~ "64 levels"

      assert refusal([List.duplicate(nil, 1_048_575), 1]) =~ "holds more than 1048576 values"
    end

    test "writes timestamps and extensions of negative type" do
      for ext <- [%Ext{type: -128, data: "x"}, %Timestamp{seconds: -1, nanoseconds: 5}] do
        assert MessagePack.decode(frame(ext)) == {:ok, ext}
      end
    end
  end

  describe "decode/1" do
    test "gives back what was encoded" do
      Terms.seed(7)

      for _ <- 1..150 do
        term = Terms.term(4)
        assert MessagePack.decode(frame(term)) === {:ok, Vectors.decoded(term)}
      end
    end

    test "gives an error for every frame that is cut short" do
      Terms.seed(11)

      for _ <- 1..40 do
        frame = frame(Terms.term(3))

        for length <- 0..(byte_size(frame) - 1), length < 400 do
          assert {:error, %DecodeError{}} = MessagePack.decode(binary_part(frame, 0, length))
        end
      end
    end

    test "gives a term or an error for any bytes" do
      Terms.seed(13)

      for _ <- 1..1000 do
        frame = mutate(frame(Terms.term(3)))
        assert {answer, _} = MessagePack.decode(frame)
        assert answer in [:ok, :error]
        MessagePack.decode(:rand.bytes(:rand.uniform(40)))
      end
    end

    test "refuses a claim to more than the frame holds, and builds nothing for it" do
      claims = [<<0xDD, -1::32>>, <<0xDF, -1::32>>, <<0xC6, -1::32>>, <<0xDB, -1::32>>]

      for claim <- claims, nesting <- [<<>>, <<0x91>>, <<0x81, 0xA1, ?a>>] do
        before = words()
        assert {:error, _} = MessagePack.decode(nesting <> claim <> <<1, 2, 3, 4, 5>>)
        assert words() - before < 100_000
      end

      assert reason(<<0xDD, -1::32, 1, 2, 3, 4, 5>>) ==
               "not MessagePack: an array of 4294967295 items, but bytes left: 5 (at byte 5)"
    end

    test "refuses more values than a frame may hold" do
      nils = fn n -> <<0xDD, n::32, :binary.copy(<<0xC0>>, n)::binary>> end
      assert {:ok, list} = MessagePack.decode(nils.(1_048_576))
      assert length(list) == 1_048_576
      assert reason(nils.(1_048_577)) =~ "more than 1048576 values"
    end

    test "makes no atom from the wire" do
      frame = frame(%{"not_an_atom_before" => "nor_an_atom_before"})
      {:ok, decoded} = MessagePack.decode(frame)

      for {key, value} <- decoded, text <- [key, value] do
        assert_raise ArgumentError, fn -> String.to_existing_atom(text) end
      end
    end

    test "hands out a bin as a part of the frame, and a string as a copy" do
      frame =
        frame(%{"bin" => {:bin, :binary.copy("b", 1000)}, "str" => String.duplicate("s", 1000)})

      {:ok, %{"bin" => bin, "str" => str}} = MessagePack.decode(frame)
      assert :binary.referenced_byte_size(bin) == byte_size(frame)
      assert :binary.referenced_byte_size(str) == 1000
    end

    test "says what is wrong and at which byte" do
      assert reason(<<0x92, 1>>) ==
               "not MessagePack: an array of 2 items, but bytes left: 1 (at byte 1)"

      assert reason(<<0x91, 0xC1>>) ==
               "not MessagePack: the byte 0xC1 begins no value (at byte 1)"

      assert reason(<<1, 2>>) == "not MessagePack: the frame goes on after the value (at byte 1)"

      assert reason(<<0x91, 0xA5, "abc">>) =~
               "the frame ends in the middle of a value (at byte 1)"

      assert reason(<<0x81, 1, 2>>) =~ "a key of a map is not a str"
      assert reason(<<0xA1, 0xFF>>) =~ "a str is not UTF-8"
      assert reason(<<0xD5, 0xFF, 1, 2>>) =~ "an ext of type -1 is not a timestamp"
    end
  end

  defp binaries([head | tail]), do: binaries(head) ++ binaries(tail)
  defp binaries(binary) when is_binary(binary), do: [binary]
  defp binaries(_byte), do: []

  defp words, do: self() |> Process.info(:total_heap_size) |> elem(1)

  defp mutate(frame) do
    Enum.reduce(1..:rand.uniform(4), frame, fn _, frame ->
      at = :rand.uniform(byte_size(frame)) - 1
      <<head::binary-size(at), byte, tail::binary>> = frame

      case :rand.uniform(4) do
        1 ->
          <<head::binary, :rand.uniform(256) - 1, tail::binary>>

        2 ->
          <<head::binary, :rand.uniform(256) - 1, byte, tail::binary>>

        3 ->
          <<head::binary, Bitwise.bxor(byte, Bitwise.bsl(1, :rand.uniform(8) - 1)), tail::binary>>

        4 ->
          <<head::binary, byte>>
      end
    end)
  end
end
