#include "tools/kt_top/terminal.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <cstdio>

namespace kt::top {

Terminal::Terminal() {
  input_is_terminal_ = tcgetattr(STDIN_FILENO, &saved_) == 0;
  if (input_is_terminal_) {
    termios raw = saved_;
    raw.c_lflag &= ~static_cast<tcflag_t>(ICANON | ECHO);
    raw.c_cc[VMIN] = 0;
    raw.c_cc[VTIME] = 0;
    tcsetattr(STDIN_FILENO, TCSANOW, &raw);
  }
  std::fputs("\x1b[?1049h\x1b[?25l", stdout);
  std::fflush(stdout);
}

Terminal::~Terminal() {
  std::fputs("\x1b[?25h\x1b[?1049l", stdout);
  std::fflush(stdout);
  if (input_is_terminal_) tcsetattr(STDIN_FILENO, TCSANOW, &saved_);
}

TerminalSize Terminal::size() const {
  winsize size{};
  if (ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) != 0 || size.ws_col == 0 || size.ws_row == 0) return {};
  return {size.ws_col, size.ws_row};
}

void Terminal::draw(const std::vector<std::string>& lines) const {
  // Each line is overwritten in place and the rest of it cleared: no flicker.
  std::string frame = "\x1b[H";
  for (std::size_t i = 0; i < lines.size(); ++i) {
    frame += lines[i] + "\x1b[K";
    if (i + 1 < lines.size()) frame += "\r\n";
  }
  frame += "\x1b[J";
  std::fputs(frame.c_str(), stdout);
  std::fflush(stdout);
}

}  // namespace kt::top
