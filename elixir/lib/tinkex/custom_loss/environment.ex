defmodule Tinkex.CustomLoss.Environment do
  @moduledoc false
  # The environment variables that a process is given. A report of a crash shows what its process
  # was started with, and an environment holds keys: `inspect` shows nothing of it. A struct and not
  # a closure, which would end the processes that hold it when this code is loaded anew twice.

  @derive {Inspect, only: []}
  @enforce_keys [:variables]
  defstruct [:variables]

  @opaque t :: %__MODULE__{variables: [{String.t(), String.t() | nil}]}

  @spec new(Enumerable.t()) :: t()
  def new(variables), do: %__MODULE__{variables: Enum.to_list(variables)}

  @spec variables(t()) :: [{String.t(), String.t() | nil}]
  def variables(%__MODULE__{variables: variables}), do: variables
end
