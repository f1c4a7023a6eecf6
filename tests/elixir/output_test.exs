defmodule Tinkex.CustomLoss.OutputTest do
  use ExUnit.Case, async: true
  doctest Tinkex.CustomLoss.Output

  alias Tinkex.CustomLoss.Output

  @record %{
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

  test "the flat record is floats under names without a colon" do
    assert Output.flat(%Output{loss_total: 2.5, gradients: nil, record: @record}) == %{
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
      output = %Output{loss_total: 2.5, gradients: [gradient], record: @record}
      assert inspect(output) =~ "loss_total: 2.5, gradients: [#{shape}]\n"
      refute inspect(output) =~ "0.125"
    end

    output = %Output{loss_total: 2.5, gradients: gradients, record: @record}
    assert inspect(output) =~ "[[2], [3, 2], [1], … 7 in all]"
    assert inspect(%{output | gradients: nil}) =~ "gradients: nil"
  end

  test "inspect shows what each term did, in lines" do
    regularizers = %{
      "smoothness" => %{
        "value" => 2.68,
        "weight" => 0.1,
        "contribution" => 0.268,
        "grad_norm" => 3.2056,
        "cosine_to_total" => -0.15349,
        "skipped" => false
      },
      "stay close" => %{
        "value" => nil,
        "weight" => 2.5e-7,
        "contribution" => 0.0,
        "grad_norm" => nil,
        "cosine_to_total" => 0.0,
        "skipped" => true
      },
      "nan" => %{"value" => :nan, "weight" => 1.0, "contribution" => :nan}
    }

    record = %{
      "base_loss" => %{"value" => 4.7, "grad_norm" => 2.2361, "cosine_to_total" => 0.98},
      "regularizers" => regularizers
    }

    output = %Output{loss_total: 5.0419, gradients: [[0.5, 0.5], [0.5]], record: record}

    assert inspect(output) == """
           #Tinkex.CustomLoss.Output<
             loss_total: 5.0419, gradients: [[2], [1]]
                             value      weight  contribution  grad_norm    cosine
             base_loss         4.7                               2.2361      0.98
             nan               nan         1.0           nan
             smoothness       2.68         0.1         0.268     3.2056  -0.15349
             "stay close"  skipped  2.5000e-07           0.0                  0.0
             "stay close": skipped
           >\
           """

    # In something else, and cut.
    assert inspect([%{output | record: %{}}]) =~
             ~r/#Tinkex.CustomLoss.Output<\n    loss_total: 5.0419, gradients: \[\[2\], \[1\]\]\n  >/

    assert inspect(output, limit: 1) =~ "\n  … 3 regularizers in all\n>"
    # Without gradients there are no columns for them.
    figures = %{"value" => 1.0, "grad_norm" => nil, "cosine_to_total" => nil}
    output = %{output | record: %{"base_loss" => figures, "regularizers" => %{}}}
    assert inspect(output) =~ ~r/\]\]\n +value\n  base_loss    1.0\n>/
  end

  @dead %{
    "value" => -1.0e-7,
    "weight" => -1.0e-7,
    "contribution" => -1.0e-14,
    "grad_norm" => 1.0e-7,
    "cosine_to_total" => -0.15349,
    "zero_gradient" => true,
    "non_finite_zeroed" => 3
  }
  @skipped %{
    "value" => nil,
    "skipped" => true,
    "error" => "no such topology:\n" <> String.duplicate("x", 90)
  }

  test "inspect tells what the figures do not say, in 80 columns" do
    long = String.duplicate("long", 20)
    record = %{"regularizers" => %{"dead" => @dead, "gone" => @skipped, long => @dead}}
    lines = %Output{loss_total: 1.0, gradients: nil, record: record} |> inspect() |> lines()

    assert "  dead: its gradient is 0, it trained nothing" in lines
    assert "  dead: 3 non-finite gradient entries were replaced by 0" in lines
    assert Enum.any?(lines, &(&1 =~ ~r/^  gone: skipped: no such topology: x+…$/))
    assert Enum.max(Enum.map(lines, &String.length/1)) == 80
    assert Enum.any?(lines, &(&1 =~ ~r/^  longlong.*… +-1.0000e-07 /))
  end

  defp lines(text), do: String.split(text, "\n")

  test "Livebook renders what inspect shows" do
    record = %{"regularizers" => %{"a```b" => @dead}}
    output = %Output{loss_total: 1.0, gradients: nil, record: record}
    assert %{text: text} = Kino.Render.to_livebook(output)
    assert text == "``````text\n#{inspect(output)}\n``````"
  end
end
