defmodule Tinkex.CustomLoss.Pool.Handle do
  @moduledoc false
  # What callers need to know of a pool, and read without asking it.

  # `terms`, by name, is nil until the first worker was ready.
  @enforce_keys [:supervisor, :pool, :config]
  defstruct @enforce_keys ++ [:terms]

  @type t :: %__MODULE__{
          supervisor: pid(),
          pool: pid(),
          config: map(),
          terms: %{String.t() => map()} | nil
        }

  @doc "That of the pool of a supervisor on this node; nil if there is none."
  @spec of(pid()) :: t() | nil
  def of(supervisor), do: :persistent_term.get({__MODULE__, supervisor}, nil)

  @doc "A change costs every process of the node a scan, and most workers have the same terms."
  def publish(%{supervisor: supervisor} = handle) do
    if of(supervisor) != handle, do: :persistent_term.put({__MODULE__, supervisor}, handle)
    handle
  end

  @doc "Forgets the pool of a supervisor, the calling process, once that has ended in any way."
  def forget_with(supervisor) do
    spawn(fn ->
      monitor = Process.monitor(supervisor)
      receive do: ({:DOWN, ^monitor, _, _, _} -> :persistent_term.erase({__MODULE__, supervisor}))
    end)
  end
end
