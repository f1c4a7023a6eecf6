defmodule Tinkex.CustomLoss.TrainingMetricsTest do
  use ExUnit.Case, async: true

  alias Tinkex.CustomLoss.{Output, Training}

  @output %Output{
    loss_total: 2.5,
    gradients: [],
    record: %{
      "loss_total" => 2.5,
      "regularizers" => %{},
      "schedule_step" => 3,
      "base_loss" => %{
        "value" => 2.5,
        "custom" => %{"dpo_loss" => 0.5, "reward:mean" => 2.0, "none" => nil, "loss:sum" => 7.0}
      }
    }
  }
  @server %{"loss:sum" => -1.5, "step" => 41, "seconds" => 0.1}

  test "the base loss's own metrics stand at the top level and in the record" do
    metrics = Training.metrics(@server, @output, :nested)
    assert %{"dpo_loss" => 0.5, "reward:mean" => 2.0, "none" => nil} = metrics
    assert metrics["base_loss"] == @output.record["base_loss"]
  end

  test "in the flat form too, as numbers" do
    metrics = Training.metrics(@server, @output, :flat)
    assert %{"dpo_loss" => 0.5, "reward:mean" => 2.0} = metrics
    assert metrics["base_loss/custom/reward.mean"] == 2.0
    refute Map.has_key?(metrics, "none")
  end

  test "the loss is the composed one, and nobody's own keys are hidden" do
    for form <- [:nested, :flat] do
      metrics = Training.metrics(@server, @output, form)
      assert %{"loss:sum" => 2.5, "surrogate_loss:sum" => -1.5, "step" => 41} = metrics
      assert metrics["seconds"] == 0.1
    end
  end
end
