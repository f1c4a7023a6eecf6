defmodule Tinkex.CustomLoss.DataTest do
  use ExUnit.Case, async: true

  alias Tinkex.CustomLoss.Test.Vectors
  alias Tinkex.CustomLoss.Wire.{Batch, Data, Frame}

  # The shapes of Tinkex's structs, which these tests cannot have.
  defmodule Datum do
    defstruct [:model_input, :loss_fn_inputs]
  end

  defmodule ModelInput do
    defstruct chunks: []
  end

  defmodule EncodedTextChunk do
    defstruct [:tokens, type: "encoded_text"]
  end

  defmodule ImageChunk do
    defstruct [:data, :format, :height, :width, :tokens, :expected_tokens, type: "image"]
  end

  defmodule TensorData do
    defstruct [:data, :dtype, :shape]
  end

  defp i64(list), do: for(n <- list, into: <<>>, do: <<n::64-little>>)
  defp f32(list), do: for(x <- list, into: <<>>, do: <<x::float-32-little>>)

  defp wire(data) do
    wire = Data.to_wire(data, length(data))
    frame = %{"data" => wire} |> Frame.encode() |> IO.iodata_to_binary()
    Vectors.open(frame)["data"]
  end

  defp datum(tokens, targets, weights) do
    %Datum{
      model_input: %ModelInput{chunks: [%EncodedTextChunk{tokens: tokens}]},
      loss_fn_inputs: %{
        "target_tokens" => %TensorData{data: targets, dtype: :int64, shape: [length(targets)]},
        "weights" => %TensorData{data: weights, dtype: :float32, shape: nil}
      }
    }
  end

  defp refusal(data) do
    assert_raise(ArgumentError, fn -> Data.to_wire(data, length(data)) end).message
  end

  describe "to_wire/2" do
    test "gives one batch a name, and one of tokens" do
      assert wire([datum([1, 2], [2, 3], [1, 0.5]), datum([4], [5], [1.0])]) == %{
               "count" => 2,
               "tokens" => %{
                 "data" => i64([1, 2, 4]),
                 "dtype" => "int64",
                 "shapes" => [[2], [1]]
               },
               "inputs" => %{
                 "target_tokens" => %{
                   "data" => i64([2, 3, 5]),
                   "dtype" => "int64",
                   "shapes" => [[2], [1]]
                 },
                 "weights" => %{
                   "data" => f32([1, 0.5, 1]),
                   "dtype" => "float32",
                   "shapes" => [[2], [1]]
                 }
               }
             }
    end

    test "reads structs, maps of atoms, maps of strings and plain tokens alike" do
      struct = datum([1, 2], [2, 3], [1, 0.5])

      atoms = %{
        model_input: [1, 2],
        loss_fn_inputs: %{
          target_tokens: {i64([2, 3]), [2]},
          weights: [1, 0.5]
        }
      }

      strings = %{
        "model_input" => %{"chunks" => [%{"type" => "encoded_text", "tokens" => [1, 2]}]},
        "loss_fn_inputs" => %{
          "target_tokens" => %{"data" => [2, 3], "dtype" => "int64", "shape" => [2]},
          "weights" => [1, 0.5]
        }
      }

      assert wire([struct]) == wire([atoms])
      assert wire([struct]) == wire([strings])
    end

    test "writes chunks of every kind as the vectors have them" do
      chunks = [
        %EncodedTextChunk{tokens: [1, 2]},
        %ImageChunk{
          data: Base.encode64(<<0x89, "PNG", 0, 0xFF>>),
          format: :png,
          height: 8,
          width: 8,
          tokens: 4
        },
        %{
          "type" => "image_asset_pointer",
          "location" => "tinker://asset/1",
          "format" => "jpeg"
        }
      ]

      data = [%{model_input: %ModelInput{chunks: chunks}}, %{model_input: %ModelInput{}}]
      assert wire(data) == Vectors.open(Vectors.message("compute_chunks").frame)["data"]

      raw = %{type: "image", data: {:bin, <<0xFF, 0xD8>>}, format: :jpeg}
      data = [%{model_input: [5, 6, 7]}, %{model_input: %{chunks: [raw]}}]

      assert wire(data) ==
               Vectors.open(Vectors.message("compute_tokens_and_chunks").frame)["data"]
    end

    test "leaves a hole where a datum lacks a name" do
      data = [%{model_input: [1]}, %{model_input: [2], loss_fn_inputs: %{advantages: [0.5]}}]
      assert %{"inputs" => %{"advantages" => batch}} = wire(data)
      assert batch == %{"data" => f32([0.5]), "dtype" => "float32", "shapes" => [nil, [1]]}
    end

    test "takes the dtype from the tensor, else from its name, never from how its numbers look" do
      inputs = %{
        target_tokens: [[1, 2], [3, 4]],
        mask: [1, 0],
        ids: {i64([7]), [1], :int64},
        bytes: <<1, 0>> |> Nx.from_binary({:u, 8})
      }

      assert %{"inputs" => wire} = wire([%{loss_fn_inputs: inputs}])
      assert wire["target_tokens"]["dtype"] == "int64"
      assert wire["target_tokens"]["shapes"] == [[2, 2]]
      assert wire["mask"] == %{"data" => f32([1, 0]), "dtype" => "float32", "shapes" => [[2]]}
      assert wire["ids"]["dtype"] == "int64"
      assert wire["bytes"] == %{"data" => i64([1, 0]), "dtype" => "int64", "shapes" => [[2]]}
    end

    test "of nothing is nothing, and of empty datums hardly more" do
      assert Data.to_wire(nil, 3) == nil
      assert Data.to_wire([], 0) == %{"count" => 0, "inputs" => %{}}
      assert Data.to_wire([%{}, %Datum{}], 2) == %{"count" => 2, "inputs" => %{}}
    end

    test "packs integers of every size of list, and refuses what int64 cannot hold" do
      for n <- [1, 8, 9, 50] do
        tokens = for i <- 1..n, do: if(rem(i, 2) == 0, do: i, else: -(2 ** 62) - i)
        assert wire([%{model_input: tokens}])["tokens"]["data"] == i64(tokens)
      end

      assert refusal([%{model_input: [1, 2 ** 63]}]) ==
               "data[0].model_input holds 9223372036854775808, which int64 cannot hold, at 1"

      assert refusal([%{model_input: [1, 2.5]}]) =~ "holds 2.5, which int64 cannot hold, at 1"
    end

    test "says where in the data something is wrong" do
      good = datum([1], [2], [1.0])
      in_chunk = fn chunk -> [good, %{model_input: %{chunks: [chunk]}}] end

      for {data, sentence} <- [
            {[good, 7], "data[1] is 7; expected a datum"},
            {[%{loss_fn_inputs: [1]}], "data[0].loss_fn_inputs is [1]; expected a map"},
            {[%{loss_fn_inputs: %{1 => [1]}}],
             "data[0].loss_fn_inputs has the key 1; expected a string"},
            {[good, datum([1], [2], ["nan"])],
             "data[1].loss_fn_inputs.weights holds \"nan\", a string (what is not finite is :nan, :infinity or :neg_infinity), at 0"},
            {[good, %{loss_fn_inputs: %{"weights" => {i64([1]), [1], :int64}}}],
             "data[1].loss_fn_inputs.weights is int64, but " <>
               "data[0].loss_fn_inputs.weights is float32; a batch has one dtype"},
            {[%{model_input: "text"}],
             "data[0].model_input is \"text\"; expected chunks or a list of tokens"},
            {[%{model_input: %{chunks: 1}}],
             "data[0].model_input.chunks is 1; expected a list of chunks"},
            {[%{model_input: [[1], [2]]}],
             "data[0].model_input has tokens of shape [2, 1], not [n]"},
            {in_chunk.(%{type: "dmel"}),
             "data[1].model_input.chunks[0].type is \"dmel\"; " <>
               "expected encoded_text, image or image_asset_pointer"},
            {in_chunk.(%{tokens: [1]}),
             "data[1].model_input.chunks[0].type is nil; expected a string"},
            {in_chunk.(%{type: "encoded_text"}),
             "data[1].model_input.chunks[0].tokens is missing"},
            {in_chunk.(%{type: "image", data: "?", format: :png}),
             "data[1].model_input.chunks[0].data is not base64; " <>
               "give the image's bytes as {:bin, bytes}"}
          ] do
        assert refusal(data) == sentence
      end

      assert_raise ArgumentError, ~r/data has 1 datum, but there are logprobs of 2/, fn ->
        Data.to_wire([good], 2)
      end

      assert_raise ArgumentError, ~r/data must be nil or a list of datums, got: 5/, fn ->
        Data.to_wire(5, 2)
      end
    end
  end

  describe "linear/2" do
    defp gradients(shapes, values),
      do: %Batch{dtype: :float32, shapes: shapes, data: f32(values)}

    test "keeps model input and target tokens, and weighs with the negated gradient" do
      data = [datum([1, 2], [2, 3], [1.0, 1.0]), datum([4], [5], [1.0])]

      assert [first, second] = Data.linear(data, gradients([[2], [1]], [0.5, -0.25, 2.0]))
      assert first.model_input === hd(data).model_input

      assert first.loss_fn_inputs === %{
               "target_tokens" => hd(data).loss_fn_inputs["target_tokens"],
               "weights" => %TensorData{data: [-0.5, 0.25], dtype: :float32, shape: [2]}
             }

      assert second.loss_fn_inputs["weights"] ===
               %TensorData{data: [-2.0], dtype: :float32, shape: [1]}
    end

    test "gives the weights the form of the target tokens" do
      for {tokens, weights} <- [
            {[2, 3], [-0.5, 0.25]},
            {{i64([2, 3]), {2}}, {f32([-0.5, 0.25]), {2}}},
            {{i64([2, 3]), [2], "int64"}, {f32([-0.5, 0.25]), [2], "float32"}},
            {%{"data" => [2, 3], "dtype" => "int64", "shape" => nil},
             %{"data" => [-0.5, 0.25], "dtype" => "float32", "shape" => [2]}},
            {%{data: i64([2, 3]), dtype: :int64, shape: [2]},
             %{data: f32([-0.5, 0.25]), dtype: :float32, shape: [2]}},
            {Nx.from_binary(i64([2, 3]), {:s, 64}), Nx.from_binary(f32([-0.5, 0.25]), {:f, 32})}
          ] do
        datum = %{"loss_fn_inputs" => %{"target_tokens" => tokens, "kept_home" => [1]}}
        assert [linear] = Data.linear([datum], gradients([[2]], [0.5, -0.25]))

        assert linear == %{
                 "loss_fn_inputs" => %{"target_tokens" => tokens, "weights" => weights}
               }
      end

      nested = %{loss_fn_inputs: %{target_tokens: [[1, 2], [3, 4]]}}
      assert [linear] = Data.linear([nested], gradients([[2, 2]], [1, 2, 3, 4]))
      assert linear.loss_fn_inputs.weights == [[-1.0, -2.0], [-3.0, -4.0]]
    end

    test "narrows the gradients of wider logprobs to the float32 of weights" do
      datum = %{loss_fn_inputs: %{target_tokens: [1, 2]}}

      for {dtype, data} <- [
            float64: <<0.5::float-64-little, -0.25::float-64-little>>,
            float16: <<0.5::float-16-little, -0.25::float-16-little>>,
            bfloat16: <<0x3F00::16-little, 0xBE80::16-little>>
          ] do
        assert [linear] = Data.linear([datum], %Batch{dtype: dtype, shapes: [[2]], data: data})
        assert linear.loss_fn_inputs.weights == [-0.5, 0.25]
      end
    end

    test "refuses what a server could not train on" do
      datum = %{loss_fn_inputs: %{target_tokens: [1, 2]}}
      nan = %Batch{dtype: :float32, shapes: [[1]], data: <<0x7FC00000::32-little>>}

      for {data, gradients, sentence} <- [
            {[datum], gradients([[1]], [1]),
             "data[0].loss_fn_inputs.target_tokens has shape [2], its gradient [1]"},
            {[%{}], gradients([[1]], [1]),
             "data[0].loss_fn_inputs has no target_tokens, which cross-entropy needs"},
            {[datum], nan, "data[0] cannot be trained on: its gradient is not finite in float32"},
            {[datum], gradients([], []), "data has 1 datum, but there are gradients of 0"}
          ] do
        assert_raise ArgumentError, sentence, fn -> Data.linear(data, gradients) end
      end
    end
  end
end
