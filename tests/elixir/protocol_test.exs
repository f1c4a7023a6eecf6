defmodule Tinkex.CustomLoss.ProtocolTest do
  use ExUnit.Case, async: true

  alias Tinkex.CustomLoss.Test.Vectors
  alias Tinkex.CustomLoss.Wire.{Batch, Protocol, Tensor}

  doctest Protocol

  defmodule Option do
    defstruct [:name, :fn, :weight, :on_error, :timeout, :run_in_executor]
  end

  defp decode(message, payload \\ ""), do: payload |> Vectors.join(message) |> Protocol.decode()

  defp changed(vector, path, value),
    do: vector |> value() |> put_in(path, value) |> decode(Vectors.message(vector).payload)

  defp without(vector, path) do
    {_, message} = vector |> value() |> pop_in(path)
    decode(message, Vectors.message(vector).payload)
  end

  defp shapes(shapes) do
    %{"shapes" => packed} = Batch.to_wire(%Batch{dtype: :float32, shapes: shapes, data: ""}, 0, 0)
    packed
  end

  defp value(vector), do: Vectors.message(vector).value

  test "a result has its gradients as a batch that is a part of the frame" do
    gradients = %{"data" => [8, 400], "dtype" => "float32", "shapes" => shapes([[50], [1, 50]])}
    message = put_in(value("result_compute")["gradients"], gradients)
    frame = Vectors.join(:binary.copy(<<0>>, 408), message)

    assert {:result, 7, result} = Protocol.decode(frame)
    assert result.loss_total == 2.5
    assert %Batch{dtype: :float32, shapes: [[50], [1, 50]]} = result.gradients
    assert :binary.referenced_byte_size(result.gradients.data) == byte_size(frame)
    assert result.record["regularizers"]["l2"]["contribution"] == 0.5

    assert {:result, 7, %{gradients: nil}} =
             Protocol.decode(Vectors.message("result_compute_without_gradients").frame)
  end

  test "answers to terms and ping" do
    assert {:result, 1, %{terms: [l2, topology]}} =
             Protocol.decode(Vectors.message("result_terms").frame)

    assert %{name: "l2", kind: "builtin", async: false} = l2
    assert [%{name: "depth", required: true, default: nil, type: ""}, _] = topology.params

    assert Protocol.decode(Vectors.message("result_ping").frame) ==
             {:result, 2 ** 32, %{in_flight: 3, uptime: 12.5, rss: 314_572_800}}
  end

  test "numbers that are not finite are atoms, whole ones floats" do
    assert {:result, 9, result} =
             Protocol.decode(Vectors.message("result_compute_non_finite").frame)

    assert result.loss_total == :infinity

    assert %{"value" => :nan, "contribution" => :neg_infinity} =
             result.record["regularizers"]["l2"]

    assert {:result, 7, %{loss_total: 2.0, record: record}} =
             changed("result_compute", ["loss_total"], 2)

    assert record["loss_total"] === 2.5
  end

  test "a worker of another version is only known by its version" do
    assert Protocol.decode(Vectors.message("ready_of_another_version").frame) ==
             {:ready, %{protocol: 4}}
  end

  test "a malformed answer is told to the one who waits, with its path" do
    for {vector, path, value, sentence} <- [
          {"result_compute", ["record", "loss_total"], "2",
           "expected a float at `record.loss_total`, got a string"},
          {"result_compute", ["record", "regularizers", "l2", "weight"], nil,
           "expected a float at `record.regularizers.l2.weight`, got nil"},
          {"result_compute", ["record", "regularizers"], [],
           "expected a map at `record.regularizers`, got an array"},
          {"result_compute", ["gradients"], [1.0], "`gradients` is not a batch"},
          {"result_compute", ["gradients", "dtype"], "float8",
           "`gradients.dtype` is not a dtype of the protocol"},
          {"result_compute", ["gradients", "shapes"], [[2], [1, 2]],
           "`gradients.shapes` is not a bin"},
          {"result_compute", ["gradients", "shapes"], {:bin, <<1::32-little, 2::32-little, 9>>},
           "`gradients.shapes` end within those of datum 1"},
          {"result_compute", ["gradients", "shapes"],
           {:bin, <<1::32-little, 2::32-little, 2::32-little, 7::32-little>>},
           "`gradients.shapes` end within those of datum 1"},
          {"result_compute", ["gradients", "shapes"], shapes([[2], [3]]),
           "`gradients.data` has 16 bytes; its shapes hold 20"},
          {"result_ping", ["uptime"], true, "expected a float at `uptime`, got a boolean"},
          {"result_terms", ["terms"], [%{}], "expected a string at `terms[0].name`, got nothing"},
          {"error_request", ["error", "kind"], "novel",
           "expected one of request, term, deadline, cancelled, protocol, startup, internal " <>
             "at `error.kind`, got \"novel\""},
          {"error_non_finite", ["error", "token"], [5, 0.5],
           "expected an integer at `error.token[1]`, got a float"}
        ] do
      op = value(vector)["op"]
      assert {:error, id, error} = changed(vector, path, value)
      assert id == value(vector)["id"]
      assert error.kind == :protocol
      assert error.message == "the worker's #{op} is malformed: " <> sentence
    end

    assert {:error, 7, %{message: message}} = without("result_compute", ["loss_total"])
    assert message =~ "expected a float at `loss_total`, got nothing"
    assert {:error, 7, %{message: message}} = without("result_compute", ["gradients", "shapes"])
    assert message =~ "`gradients.shapes` is missing"
  end

  test "keys that may be nil may be absent" do
    error = %{"kind" => "internal", "message" => "a bug"}
    assert {:error, nil, error} = decode(%{"op" => "error", "error" => error})
    assert %{kind: :internal, message: "a bug", traceback: nil, token: nil} = error
  end

  test "a message that nobody waits for is invalid, with the reason" do
    for {message, reason} <- [
          {%{}, "the worker's message has no op"},
          {%{op: "novel"}, "the worker's message has the op \"novel\", which the protocol lacks"},
          {[1], "the worker's message is an array, not a map"},
          {%{op: "result", id: "7"},
           "the worker's result is malformed: expected an integer at `id`, got a string"},
          {%{op: "error", id: nil},
           "the worker's error is malformed: expected a map at `error`, got nothing"},
          {%{op: "ready", protocol: 3},
           "the worker's ready is malformed: expected a string at `package`, got nothing"},
          {%{op: "log", level: "loud"},
           "the worker's log is malformed: expected one of debug, info, warning, error, " <>
             "critical at `level`, got \"loud\""}
        ] do
      assert decode(message) == {:invalid, reason}
    end

    assert {:invalid, "the worker's message is not MessagePack: " <> _} =
             Protocol.decode(<<0xC1>>)
  end

  test "no mutation of any message crashes the decoder" do
    :rand.seed(:exsss, 17)

    for vector <- Vectors.messages(), _ <- 1..40 do
      at = :rand.uniform(byte_size(vector.frame)) - 1
      <<head::binary-size(at), _, tail::binary>> = vector.frame
      answer = Protocol.decode(<<head::binary, :rand.uniform(256) - 1, tail::binary>>)
      assert elem(answer, 0) in [:ready, :result, :error, :log, :invalid]
    end
  end

  test "options of a term travel by the names of the protocol, atoms as strings, nil left out" do
    regularizer = %Option{
      name: "l2",
      fn: :l2,
      weight: 0.5,
      on_error: :skip,
      run_in_executor: true
    }

    request = %{id: 1, logprobs: Tensor.logprobs([[-1.0]]), regularizers: [regularizer]}

    message = request |> Protocol.encode_compute() |> IO.iodata_to_binary() |> Vectors.open()

    assert message["regularizers"] == [
             %{
               "name" => "l2",
               "fn" => "l2",
               "weight" => 0.5,
               "on_error" => "skip",
               "run_in_executor" => true
             }
           ]

    assert %{"step" => nil, "gradients" => true, "data" => nil, "base_loss" => nil} = message
  end

  test "a parameter without a form is refused with its path" do
    request = %{
      id: 1,
      logprobs: Tensor.logprobs([[-1.0]]),
      regularizers: [%{name: "l2", fn: "l2", weight: 1.0, params: %{reduction: :mean}}]
    }

    assert_raise ArgumentError,
                 ~r/at `regularizers\[0\].params.reduction` is the atom :mean/,
                 fn ->
                   Protocol.encode_compute(request)
                 end
  end
end
