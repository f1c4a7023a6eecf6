defmodule Tinkex.CustomLoss.TensorTest do
  use ExUnit.Case, async: true

  alias Tinkex.CustomLoss.Wire.{Batch, Tensor}

  doctest Tensor

  # The shape of Tinkex's struct, which these tests cannot have.
  defmodule TensorData do
    defstruct [:data, :dtype, :shape]
  end

  defp f32(list), do: for(x <- list, into: <<>>, do: <<x::float-32-little>>)

  defp nx(binary, type, shape), do: binary |> Nx.from_binary(type) |> Nx.reshape(shape)

  # What comes back for these logprobs when every gradient is -2.
  defp gradients(tensors) do
    batch = Tensor.logprobs(tensors)
    size = Enum.sum(Enum.map(batch.shapes, &Batch.count/1))

    value =
      case batch.dtype do
        :float32 -> <<-2.0::float-32-little>>
        :float64 -> <<-2.0::float-64-little>>
        :float16 -> <<-2.0::float-16-little>>
        :bfloat16 -> <<0xC000::16-little>>
      end

    {:ok, gradients} = Tensor.restore(%{batch | data: :binary.copy(value, size)}, batch)
    gradients
  end

  defp refusal(tensors),
    do: assert_raise(ArgumentError, fn -> Tensor.logprobs(tensors) end).message

  @forms [
    list: {[-0.5, -1, -2.0], [-2.0, -2.0, -2.0]},
    nested: {[[-0.5, -1.0], [-2.0, -3.0]], [[-2.0, -2.0], [-2.0, -2.0]]},
    empty: {[], []},
    rows_without_columns: {[[], []], [[], []]},
    bytes: {{<<0::64>>, [2]}, {<<-2.0::float-32-little, -2.0::float-32-little>>, [2]}},
    bytes_with_tuple:
      {{<<0::64>>, {1, 2}}, {<<-2.0::float-32-little, -2.0::float-32-little>>, {1, 2}}},
    bytes_with_dtype: {{<<0::64>>, [1], :float64}, {<<-2.0::float-64-little>>, [1], :float64}},
    bytes_with_text: {{<<0::16>>, [1], "bfloat16"}, {<<0xC000::16-little>>, [1], "bfloat16"}},
    raw:
      {%{"data" => [-0.5], "dtype" => "float32", "shape" => [1]},
       %{"data" => [-2.0], "dtype" => "float32", "shape" => [1]}},
    raw_without_shape: {%{"data" => [-0.5, 0]}, %{"data" => [-2.0, -2.0]}},
    output: {
      %{
        "logprobs" => %{"data" => [-0.5, -1.0], "dtype" => "float32", "shape" => [1, 2]},
        "other" => 1
      },
      %{
        "logprobs" => %{"data" => [-2.0, -2.0], "dtype" => "float32", "shape" => [1, 2]},
        "other" => 1
      }
    },
    map_of_bytes:
      {%{data: <<0::64>>, dtype: :float32, shape: nil},
       %{data: <<-2.0::float-32-little, -2.0::float-32-little>>, dtype: :float32, shape: nil}}
  ]

  for {form, {_given, _back}} <- @forms do
    test "gradients go back as they came: #{form}" do
      {given, back} = unquote(Macro.escape(@forms[form]))
      assert gradients([given]) === [back]
    end
  end

  test "gradients go back as they came: TensorData" do
    given = %TensorData{data: [-0.5, -1.5], dtype: :float32, shape: [2, 1]}

    assert gradients([given]) === [
             %TensorData{data: [-2.0, -2.0], dtype: :float32, shape: [2, 1]}
           ]
  end

  test "gradients go back as they came: Nx tensors of every float type" do
    for {type, zero, gradient} <- [
          {{:f, 32}, <<0::32>>, <<-2.0::float-32-little>>},
          {{:f, 64}, <<0::64>>, <<-2.0::float-64-little>>},
          {{:f, 16}, <<0::16>>, <<-2.0::float-16-little>>},
          {{:bf, 16}, <<0::16>>, <<0xC000::16-little>>}
        ] do
      assert gradients([nx(zero <> zero, type, {1, 2})]) ==
               [nx(gradient <> gradient, type, {1, 2})]
    end
  end

  test "forms of one dtype mix in a batch, row-major one after another" do
    batch = Tensor.logprobs([[-1.0], [[-2.0, -3.0]], {f32([-4.0]), [1]}, %{"data" => [-5]}])
    assert batch.dtype == :float32
    assert batch.shapes == [[1], [1, 2], [1], [1]]
    assert IO.iodata_to_binary(batch.data) == f32([-1, -2, -3, -4, -5])
    assert gradients([[-1.0], {f32([-4.0]), [1]}]) == [[-2.0], {f32([-2.0]), [1]}]
  end

  test "bytes are not copied, in or out" do
    binary = :binary.copy(f32([-1.0]), 1000)
    batch = Tensor.logprobs([{binary, [1000]}, {binary, [10, 100]}])
    assert Enum.all?(batch.data, &:erts_debug.same(&1, binary))

    answer = %{batch | data: :binary.copy(binary, 2)}
    {:ok, [{first, _}, {second, _}]} = Tensor.restore(answer, batch)
    for part <- [first, second], do: assert(:binary.referenced_byte_size(part) == 8000)
  end

  test "lists of any length pack like their values one by one" do
    for n <- [0, 1, 7, 8, 9, 17, 100] do
      list = for i <- 1..n//1, do: if(rem(i, 3) == 0, do: -i, else: -i / 7)
      batch = Tensor.logprobs([list])
      assert IO.iodata_to_binary(batch.data) == f32(list)
      {:ok, [back]} = Tensor.restore(batch, batch)
      assert f32(back) == f32(list)
    end
  end

  # So many that they are made in other processes.
  test "long lists of every form come back in order, and nothing else comes" do
    bytes = for i <- 1..70_000, into: <<>>, do: <<i / 8::float-32-little>>
    flat = for i <- 1..70_000, do: i / 8
    rows = Enum.chunk_every(flat, 7)

    tensors =
      [rows, {bytes, [70_000]}, %{"data" => flat, "shape" => [10_000, 7]}] ++
        [[], %{logprobs: %{data: flat}, other: 1}, [1.0]]

    Process.flag(:trap_exit, true)
    batch = Tensor.logprobs(tensors)
    assert Tensor.restore(batch, batch) == {:ok, tensors}
    assert Process.info(self(), :messages) == {:messages, []}
  end

  test "non-finite logprobs are atoms, there and back" do
    list = [:neg_infinity, -0.5, :nan, :infinity]
    batch = Tensor.logprobs([list])

    assert IO.iodata_to_binary(batch.data) ==
             <<0xFF800000::32-little, -0.5::float-32-little, 0x7FC00000::32-little,
               0x7F800000::32-little>>

    assert Tensor.restore(batch, batch) == {:ok, [list]}
  end

  test "an answer to another question is an error" do
    batch = Tensor.logprobs([[-1.0, -2.0]])
    answer = %Batch{dtype: :float32, shapes: [[1, 2]], data: f32([0, 0])}
    assert {:error, sentence} = Tensor.restore(answer, batch)

    assert sentence =~
             "the gradients are #Tinkex.CustomLoss.Wire.Batch<float32, [[1, 2]]>, the logprobs"
  end

  test "what is wrong with a tensor is said with the index of its datum" do
    ok = [-1.0]

    for {tensors, sentence} <- [
          {[ok, ["nan"]],
           "logprobs[1] holds \"nan\", a string (what is not finite is :nan, :infinity or :neg_infinity), at 0"},
          {[ok, [0.0, nil]], "logprobs[1] holds nil, which is not a number, at 1"},
          {[[1.0e39]], "logprobs[0] holds 1.0e39, which float32 cannot hold, at 0"},
          {[[[1.0], [1.0, 2.0]]], "logprobs[0] is ragged: a row of [1] and one of [2]"},
          {[[[1.0], 2.0]], "logprobs[0] holds 2.0 among its rows"},
          {[[[[1.0]]]], "logprobs[0] has shape [1, 1, 1]; expected [T] or [T, K]"},
          {[ok, nil], "logprobs[1] is nil; every datum has logprobs"},
          {[{<<0::32>>, [2]}],
           "logprobs[0] has shape [2], that is 8 bytes of float32, but holds 4"},
          {[{<<0::32>>, [-1]}],
           "logprobs[0] has the shape [-1]; expected a list of sizes, such as [T]"},
          {[{<<0::32>>, 1}],
           "logprobs[0] has the shape 1; expected a list of sizes, such as [T]"},
          {[{<<0::32>>, [1], :f32}],
           "logprobs[0] has the dtype :f32; expected float32, float64, float16, bfloat16, int64 or int32"},
          {[%{"data" => [1.0], "shape" => [2]}],
           "logprobs[0] has shape [2], that is 2 values, but holds 1"},
          {[%{data: :none}],
           "logprobs[0] has data :none; expected a flat list of numbers or a binary"},
          {[%{"logprobs" => %{"data" => ["x"]}}],
           "logprobs[0] holds \"x\", a string (what is not finite is :nan, :infinity or :neg_infinity), at 0"},
          {[ok, {<<0::64>>, [1], :float64}],
           "logprobs[1] is float64, but logprobs[0] is float32; a batch has one dtype"},
          {[%{data: [1], dtype: :int64}],
           "logprobs[0] is int64; logprobs are floating-point numbers"},
          {[nx(<<0::64>>, {:c, 64}, {1})],
           "logprobs[0] is an Nx tensor of type {:c, 64}, which has no dtype here"},
          {[1.5],
           "logprobs[0] is 1.5; expected a list of numbers, an Nx tensor, a TensorData, or {binary, shape}"},
          {:none, "logprobs must be a list with one tensor a datum, got: :none"}
        ] do
      assert refusal(tensors) == sentence
    end
  end

  test "inspecting a batch shows shapes, never data" do
    batch = Tensor.logprobs(for n <- 1..5, do: List.duplicate(-1.0, n))
    assert inspect(batch) == "#Tinkex.CustomLoss.Wire.Batch<float32, [[1], [2], [3], … 5 in all]>"
  end
end
