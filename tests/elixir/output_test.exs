defmodule Tinkex.CustomLoss.OutputTest do
  use ExUnit.Case, async: true
  doctest Tinkex.CustomLoss.Output

  alias Tinkex.CustomLoss.Output

  @telemetry %{
    "loss_total" => 2.5,
    "base_loss" => nil,
    "schedule_step" => 3,
    "regularizers" => %{
      "kl" => %{
        "contribution" => 0.5,
        "value" => :nan,
        "skipped" => false,
        "differentiable" => true,
        "error" => "none",
        "custom" => %{"kl:mean" => 0.25}
      }
    }
  }

  test "flat telemetry is floats under names without a colon" do
    assert Output.flat(%Output{loss_total: 2.5, gradients: nil, telemetry: @telemetry}) == %{
             "loss_total" => 2.5,
             "schedule_step" => 3.0,
             "regularizers/kl/contribution" => 0.5,
             "regularizers/kl/skipped" => 0.0,
             "regularizers/kl/differentiable" => 1.0,
             "regularizers/kl/custom/kl.mean" => 0.25
           }
  end

  test "inspect shows shapes, not data" do
    gradients = [
      [0.125, 0.25],
      [[0.125, 0.25], [0.125, 0.25], [0.125, 0.25]],
      {<<0, 0, 0, 62>>, {1}},
      %{"logprobs" => %{"data" => [0.125], "shape" => [1]}},
      %{data: <<0, 0, 0, 62, 0, 0, 0, 62>>, dtype: :float32},
      %{"data" => <<0, 0, 0, 62, 0, 0, 0, 62>>, "dtype" => "float64", "shape" => nil},
      %{data: <<0, 0, 0, 62>>}
    ]

    shapes = ["[2]", "[3, 2]", "[1]", "[1]", "[2]", "[1]", "[1]"]

    for {gradient, shape} <- Enum.zip(gradients, shapes) do
      output = %Output{loss_total: 2.5, gradients: [gradient], telemetry: @telemetry}

      assert inspect(output) ==
               "#Tinkex.CustomLoss.Output<loss_total: 2.5, gradient_shapes: [#{shape}], " <>
                 ~s(regularizers: %{"kl" => 0.5}>)
    end

    output = %Output{loss_total: 2.5, gradients: gradients, telemetry: @telemetry}
    assert inspect(output) =~ "[[2], [3, 2], [1], … 7 in all]"
    assert inspect(%{output | gradients: nil}) =~ "gradient_shapes: nil"
  end
end
