defmodule Mix.Tasks.Tinkex.CustomLoss.Setup do
  @shortdoc "Makes the Python environment that Tinkex.CustomLoss runs in"

  @moduledoc """
  Makes a Python environment with all that `Tinkex.CustomLoss` needs: `Tinkex.CustomLoss.setup!/1` as
  a task.

      mix tinkex.custom_loss.setup --torch cpu
      mix tinkex.custom_loss.setup --python python3.12 --extra sandbox
      mix tinkex.custom_loss.setup --torch ==2.13.0 -- --index-url https://mirror.example/simple

  ## Options

  Those of `Tinkex.CustomLoss.setup!/1`: `--dir`, `--python`, `--torch` (`cpu`, or a version),
  `--torch-index`, `--verbose`, and `--extra`, repeatable, for `:extras`. What follows `--` are its `:args`.

  An environment elsewhere than in `.venv` has to be named to pools: `DIR/bin/python` in the option
  `:python` or in `TINKEX_CUSTOM_LOSS_PYTHON`.
  """

  use Mix.Task

  alias Mix.Tasks.Tinkex.CustomLoss.Doctor
  alias Tinkex.CustomLoss
  alias Tinkex.CustomLoss.SetupError

  @requirements ["app.config"]
  @switches [
    dir: :string,
    python: :string,
    torch: :string,
    torch_index: :string,
    extra: :keep,
    verbose: :boolean
  ]

  @impl true
  def run(args) do
    {ours, installer_args} = Enum.split_while(args, &(&1 != "--"))
    given = Doctor.options!(ours, @switches, __MODULE__)

    opts =
      Keyword.drop(given, [:extra, :torch]) ++
        torch(given[:torch]) ++
        [extras: Keyword.get_values(given, :extra), args: Enum.drop(installer_args, 1)]

    python = CustomLoss.setup!(opts)

    Mix.shell().info(
      "setup: done; to check it: mix tinkex.custom_loss.doctor" <>
        if(given[:dir], do: " --python #{python}", else: "")
    )
  rescue
    error in [SetupError, ArgumentError] -> Mix.raise(Exception.message(error))
  end

  defp torch(nil), do: []
  defp torch("cpu"), do: [torch: :cpu]
  defp torch("default"), do: [torch: :default]
  defp torch(version), do: [torch: version]
end
