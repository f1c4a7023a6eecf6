defmodule Tinkex.CustomLoss.Pool.Reaper do
  @moduledoc false
  # Ends the operating system's processes of a pool, with all their children, whatever they do.
  #
  # A closed port is only an end of file to Python, and code that holds its interpreter's lock never
  # looks. Workers are therefore killed from outside: on request, and when the Erlang process of a
  # worker ends in any way. This process starts before the workers and ends after them.
  #
  # What kills is a shell of its own. It outlives us by the moment that it takes to see that its
  # input ends, and then kills all that are left: also when this process was killed, and when the
  # emulator halts, which it would not do while a worker leaves unread what was sent to it.

  use GenServer

  # The kill of the shell, because a container need not have the program. A negative number is that
  # of a process group: the worker and what it started, also after the worker itself is gone.
  @shell """
  groups=' '
  while read -r what group; do
    case $what in
      watch) groups="$groups$group " ;;
      kill) kill -KILL "-$group"; groups="${groups%% $group *} ${groups#* $group }" ;;
    esac
  done
  for group in $groups; do kill -KILL "-$group"; done
  """

  def start_link(supervisor), do: GenServer.start_link(__MODULE__, supervisor)

  @doc "The reaper among the children of `supervisor`."
  def whereis(supervisor), do: :persistent_term.get({__MODULE__, supervisor})

  @doc "Ends the process group of `os_pid` when the calling process ends."
  def watch(reaper, os_pid), do: GenServer.cast(reaper, {:watch, self(), os_pid})

  @doc "Ends the process group of `os_pid`, which the calling process had watched, now."
  def kill(reaper, os_pid), do: GenServer.cast(reaper, {:kill, self(), os_pid})

  @impl true
  def init(supervisor) do
    Process.flag(:trap_exit, true)
    :persistent_term.put({__MODULE__, supervisor}, self())
    # There is nothing to say about a group that does not exist any more.
    shell = ["-c", "exec 2>/dev/null\n" <> @shell]
    port = Port.open({:spawn_executable, "/bin/sh"}, [:binary, :hide, args: shell])
    {:ok, %{supervisor: supervisor, port: port, watched: %{}}}
  end

  @impl true
  def handle_cast({:watch, owner, os_pid}, state) do
    Port.command(state.port, "watch #{os_pid}\n")
    {:noreply, put_in(state.watched[owner], {Process.monitor(owner), os_pid})}
  end

  def handle_cast({:kill, owner, os_pid}, state) do
    case state.watched do
      %{^owner => {monitor, ^os_pid}} ->
        Process.demonitor(monitor, [:flush])
        {:noreply, reap(state, owner)}

      _ended_before ->
        {:noreply, state}
    end
  end

  @impl true
  def handle_info({:DOWN, _monitor, :process, owner, _reason}, state),
    do: {:noreply, reap(state, owner)}

  # Without the shell nobody would be killed: whoever restarts this process starts all workers anew.
  def handle_info({:EXIT, port, _reason}, %{port: port} = state),
    do: {:stop, :shell_ended, state}

  def handle_info({:EXIT, _pid, _reason}, state), do: {:noreply, state}

  # The port closes with this process.
  @impl true
  def terminate(_reason, state), do: :persistent_term.erase({__MODULE__, state.supervisor})

  defp reap(state, owner) do
    {{_monitor, os_pid}, watched} = Map.pop!(state.watched, owner)
    Port.command(state.port, "kill #{os_pid}\n")
    %{state | watched: watched}
  end
end
