defmodule Mix.Tasks.Tinkex.CustomLoss.Terms do
  @shortdoc "Lists what can be named as a term"

  @moduledoc """
  Lists the terms that `:fn` of a base loss or regularizer may name, or tells all of those that are
  named here: parameters, what they read, and their documentation.

      mix tinkex.custom_loss.terms
      mix tinkex.custom_loss.terms kl
      mix tinkex.custom_loss.terms --load my_losses my_losses:smoothness

  ## Options

    * `--python` - as the option `:python` of a pool
    * `--load` - as an entry of the option `:load` of a pool. Repeatable
  """

  use Mix.Task

  alias Mix.Tasks.Tinkex.CustomLoss.Doctor
  alias Tinkex.CustomLoss.Options
  alias Tinkex.CustomLoss.Pool.Python

  @requirements ["app.config"]
  @switches [python: :string, load: :keep]

  @impl true
  def run(args) do
    {opts, names} = Doctor.parse!(args, @switches, __MODULE__)
    config = opts |> Doctor.pool_options() |> Options.start!()

    with {:ok, python} <- Python.find(config.python),
         :ok <- Python.check(python, config) do
      Doctor.python!(python, "terms", config, names)
    else
      {:error, error} -> Mix.raise(Exception.message(error))
    end
  end
end
